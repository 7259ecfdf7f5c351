"""The checks of position encodings: they keep shapes, and say what a token's place means for it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch

from attlas.contract.measure import Measure, Subject, check, distance, finite, holds, same
from attlas.ops import indices

HEADS, WIDTH, DIM = 2, 8, 16


def made(subject: Subject) -> Any:
    """The example's encoding in float64."""
    torch.manual_seed(0)
    return subject.made().double()


@check("position")
def keeps_shapes(subject: Subject) -> Iterator[Measure]:
    """Inputs, queries and keys come back in their shape and type, at any positions."""
    encoding = made(subject)
    for positions in (torch.arange(5), torch.tensor([[0, 1, 2, 3, 4], [0, 0, 1, 2, 9]])):
        x = torch.randn(2, 5, DIM, dtype=torch.float64)
        q = torch.randn(2, HEADS, 5, WIDTH, dtype=torch.float64)
        for case, before, after in (
            ("embed", x, encoding.embed(x, positions)),
            ("rotate", q, encoding.rotate(q, positions)),
        ):
            kept = after.shape == before.shape and after.dtype == before.dtype
            yield holds(
                case, kept, f"{list(after.shape)} of {after.dtype} from {list(before.shape)}"
            )
            yield finite(case, after)


@check("position")
def by_position_alone(subject: Subject) -> Iterator[Measure]:
    """What happens to a token rests on its own position, not on where it lies in the tensor."""
    encoding = made(subject)
    order = torch.tensor([3, 0, 4, 1, 2])
    q = torch.randn(1, HEADS, 5, WIDTH, dtype=torch.float64)
    x = torch.randn(1, 5, DIM, dtype=torch.float64)
    at = torch.arange(5)
    rotated = encoding.rotate(q, at)[:, :, order]
    yield same("rotate", encoding.rotate(q[:, :, order], at[order]), rotated)
    yield same("embed", encoding.embed(x[:, order], at[order]), encoding.embed(x, at)[:, order])


@check("position")
def bias_is_finite(subject: Subject) -> Iterator[Measure]:
    """The change of scores, where there is one, is finite for all pairs of a long sequence."""
    encoding = made(subject)
    if encoding.score_mod is None:
        yield holds("none", True, "")
        return
    scores = torch.zeros(1, HEADS, 300, 300, dtype=torch.float64)
    yield finite("300 tokens", encoding.score_mod(scores, *indices(scores, 0)))


@check("position")
def materialised(subject: Subject) -> Iterator[Measure]:
    """Made on the meta device and emptied onto a real one, or rounded and loaded, it does the same."""
    encoding, at = made(subject).float(), torch.tensor([0, 5, 1000])
    state = deepcopy(encoding.state_dict())
    q, x = torch.randn(1, HEADS, 3, WIDTH), torch.randn(1, 3, DIM)
    scores = torch.zeros(1, HEADS, 300, 300)
    with torch.device("meta"):
        blank = subject.made()
    blank.to_empty(device="cpu").load_state_dict(state)
    rounded = deepcopy(encoding).to(torch.bfloat16).to(torch.float32)
    rounded.load_state_dict(state)
    for way, other in {"to_empty": blank, "rounded": rounded}.items():
        yield Measure(f"{way} rotate", distance(other.rotate(q, at), encoding.rotate(q, at)), 0.0)
        yield Measure(f"{way} embed", distance(other.embed(x, at), encoding.embed(x, at)), 0.0)
        if encoding.score_mod is not None:
            found, wanted = (e.score_mod(scores, *indices(scores, 0)) for e in (other, encoding))
            yield Measure(f"{way} score_mod", distance(found, wanted), 0.0)


@check("position")
def copied(subject: Subject) -> Iterator[Measure]:
    """A deep copy does the same."""
    encoding = made(subject)
    q, at = torch.randn(1, HEADS, 5, WIDTH, dtype=torch.float64), torch.arange(5)
    yield Measure(
        "deepcopy", distance(deepcopy(encoding).rotate(q, at), encoding.rotate(q, at)), 0.0
    )


@check("position")
def described(subject: Subject) -> Iterator[Measure]:
    """It has a docstring."""
    yield holds("docstring", bool(inspect.getdoc(subject.object)), "no docstring")
