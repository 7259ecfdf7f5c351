"""The checks of masks: arithmetic on blocks never claims what the pairs do not hold."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attlas.contract.measure import Measure, Subject, check, holds, refuses
from attlas.masks import Mask, block_mask, dense, grid, sdpa_flags

BLOCKS = (1, 3, 4, 16)


def sized(subject: Subject) -> tuple[Mask, int]:
    """The example's mask and the length that it is for."""
    mask = subject.object(**subject.example)
    assert isinstance(mask, Mask)
    return mask, int(subject.example.get("length", 48))


def covered(pairs: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(some, every) of each block of pairs, from the pairs themselves."""
    *lead, rows, columns = pairs.shape
    low, high = -rows % block, -columns % block
    shape = (*lead, (rows + low) // block, block, (columns + high) // block, block)
    some = pad(pairs, (0, high, 0, low), value=False).view(shape).any(-1).any(-2)
    every = pad(pairs, (0, high, 0, low), value=True).view(shape).all(-1).all(-2)
    return some, every


def grid_measures(case: str, mask: Mask, queries: int, keys: int, block: int) -> Iterator[Measure]:
    """`some` covers every block with a visible pair, `every` no block with a hidden one."""
    pairs = dense(mask, queries, keys)
    some, every = covered(pairs, block)
    claimed = grid(mask, queries, keys, q_block=block, k_block=block)
    missed, wrong = (some & ~claimed[0]).sum(), (claimed[1] & ~every).sum()
    yield Measure(f"{case} some", float(missed), 0.0, f"{missed} blocks with visible pairs are missed")
    yield Measure(f"{case} every", float(wrong), 0.0, f"{wrong} blocks with hidden pairs are whole")


@check("mask")
def blocks_claim(subject: Subject) -> Iterator[Measure]:
    """The grid of blocks claims neither too few visible blocks nor too many whole ones."""
    mask, length = sized(subject)
    for block in BLOCKS:
        for queries in (1, length // 3, length):
            case = f"block={block} queries={queries}"
            yield from grid_measures(case, mask, queries, length, block)


@check("mask")
def lowerings_agree(subject: Subject) -> Iterator[Measure]:
    """The dense tensor, SDPA's flags and FlexAttention's BlockMask show the same pairs."""
    mask, length = sized(subject)
    pairs = dense(mask, length, length)
    flags = sdpa_flags(mask, length, length)
    shown: Any = flags.get("attn_mask")
    if flags.get("is_causal"):
        shown = torch.ones(length, length, dtype=torch.bool).tril()
    elif shown is None:
        shown = torch.ones(length, length, dtype=torch.bool)
    yield holds("sdpa", bool((pairs == shown).all()), "SDPA's flags show other pairs")
    blocks = block_mask(mask, length, length, block=16).to_dense().bool()
    some, _ = covered(pairs, 16)
    yield holds("BlockMask", not bool((some & ~blocks).any()), "a block with visible pairs is absent")


@check("mask")
def algebra(subject: Subject) -> Iterator[Measure]:
    """Negation and transposition are those of the pairs."""
    mask, length = sized(subject)
    pairs = dense(mask, length, length)
    flipped, turned = dense(~mask, length, length), dense(mask.T, length, length)
    yield holds("not", bool((flipped == ~pairs).all()), "~ is not the negation")
    yield holds("transposed", bool((turned == pairs.mT).all()), ".T is not the transposition")


@check("mask")
def repeatable(subject: Subject) -> Iterator[Measure]:
    """Made twice, it shows the same pairs."""
    mask, length = sized(subject)
    twin, _ = sized(subject)
    alike = bool((dense(mask, length, length) == dense(twin, length, length)).all())
    yield holds("twice", alike, "two of the same arguments differ")


@check("mask")
def wrong_arguments(subject: Subject) -> Iterator[Measure]:
    """Negative numbers are a ValueError that names the argument."""
    for name, parameter in inspect.signature(subject.object).parameters.items():
        if parameter.annotation in (int, "int") and name != "seed":
            wrong = {**subject.example, name: -1}
            yield refuses(f"{name}=-1", partial(subject.object, **wrong), name)


@check("mask")
def described(subject: Subject) -> Iterator[Measure]:
    """The function says what its arguments are."""
    yield holds("docstring", bool(inspect.getdoc(subject.object)), "no docstring")
