"""What is kept for a mask: as old as what its tensors hold, held no longer than it, fit for training."""

from __future__ import annotations

import gc
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch

import attlas
from attlas import masks, ops
from attlas.masks import Mask

TOKENS = 300


def documents(ids: torch.Tensor) -> Mask:
    return masks.causal & masks.document(ids)


def plain(mask: Mask) -> torch.Tensor:
    return masks.dense(mask, TOKENS, TOKENS)


@pytest.fixture
def qkv() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, 2, TOKENS, 8) for _ in range(3)]


@pytest.mark.parametrize("by", ["copy_", "numpy", "data"])
@pytest.mark.parametrize("route", ["auto", "blocks", "chunked"])
def test_a_mask_over_a_buffer_is_what_the_buffer_holds(
    qkv: list[torch.Tensor], by: str, route: Any
) -> None:
    memory = np.zeros(TOKENS, dtype=np.int64)
    ids, new = torch.from_numpy(memory), torch.arange(TOKENS) // 100
    mask = documents(ids)
    before = ops.attend(*qkv, mask=mask, route=route)
    if by == "numpy":
        memory[:] = new.numpy()
    else:
        (ids.data if by == "data" else ids).copy_(new)
    after = ops.attend(*qkv, mask=mask, route=route)
    assert not torch.allclose(before, after)
    wanted = ops.attend(*qkv, mask=plain(documents(new)), route="reference")
    torch.testing.assert_close(after, wanted)
    assert not masks.hides_nothing(mask, TOKENS, TOKENS, 0)


def test_the_other_lowerings_follow_the_buffer() -> None:
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    mask = masks.padding(valid)
    assert masks.hides_nothing(mask, 1, TOKENS, TOKENS - 1)
    assert masks.density(mask, TOKENS, TOKENS, 0) == 1.0
    assert masks.block_mask(mask, TOKENS, TOKENS).to_dense().all()
    valid[:, 128:] = False
    assert not masks.hides_nothing(mask, 1, TOKENS, TOKENS - 1)
    assert masks.density(mask, TOKENS, TOKENS, 0) == pytest.approx(0.4)  # two of five blocks of keys
    assert masks.block_mask(mask, TOKENS, TOKENS).to_dense().float().mean() == pytest.approx(1 / 3)


def test_what_does_not_change_is_worked_out_once(qkv: list[torch.Tensor]) -> None:
    from attlas.ops.blocks import plan

    cpu, table = torch.device("cpu"), masks.document(torch.arange(TOKENS) // 100)
    for mask in (masks.causal & masks.window(9), masks.causal & table):
        again = masks.causal & (mask.right if isinstance(mask, type(mask & mask)) else mask)
        assert plan(mask, TOKENS, TOKENS, 0, cpu) is plan(again, TOKENS, TOKENS, 0, cpu)


def test_masks_that_are_gone_are_not_held(qkv: list[torch.Tensor]) -> None:
    held = []
    for _ in range(3):
        ids = torch.arange(TOKENS) // 100
        mask = documents(ids)
        routes: tuple[Any, ...] = ("auto", "blocks", "chunked")
        for route in routes:
            ops.attend(*qkv, mask=mask, route=route)
        masks.block_mask(mask, TOKENS, TOKENS)
        held += [ref(mask), ref(ids)]
        del mask, ids
    gc.collect()
    assert [each() for each in held] == [None] * 6


@pytest.mark.parametrize("name", ["softmax", "softmax-as-rnn"])
def test_evaluation_leaves_nothing_that_training_cannot_use(name: str) -> None:
    pattern = masks.causal & (masks.window(64) | masks.keys({0, 3}, 512))
    options = {"mask": pattern} if name == "softmax" else {"causal": True}
    torch.manual_seed(0)
    layer, x = attlas.make(name, dim=16, heads=2, **options), torch.randn(1, 512, 16)
    with torch.inference_mode():
        layer.eval()(x)
    layer.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_tracing_leaves_nothing_behind() -> None:
    torch.manual_seed(0)
    layer = attlas.make("softmax-as-rnn", dim=16, heads=2, causal=True).eval()
    x = torch.randn(1, 8, 16)
    torch.export.export(layer, (x,))
    torch.func.grad(lambda x: layer(x).sum())(x)
    assert type(layer(x)) is torch.Tensor
