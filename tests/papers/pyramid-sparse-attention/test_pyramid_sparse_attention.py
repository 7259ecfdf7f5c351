"""pyramid-sparse-attention: exact at level 1 and where keys are alike, better than to keep or drop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attlas import masks, ops
from attlas.ops.pyramid_sparse_attention import (
    ENDS,
    SIMILAR,
    chosen_levels,
    importance,
    pooled,
    pyramid_sparse_attention,
    ranked,
)
from recorded_qkv import recorded

SMALL: Any = {"q_block": 16, "k_block": 8}


def inputs(queries: int = 52, keys: int = 77, kv: int = 2, **kind: Any) -> list[Tensor]:
    torch.manual_seed(0)
    kind = {"dtype": torch.float64, **kind}
    sizes = ((2, 4, queries, 8), (2, kv, keys, 8), (2, kv, keys, 6))
    return [torch.randn(size, **kind) for size in sizes]


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> tuple[Tensor, Tensor]:
    return ops.attend(q, k, v, mask=mask, return_lse=True, route="reference")


def patterns(keys: int = 77) -> dict[str, Any]:
    valid = torch.arange(keys) >= torch.tensor([[0], [30]])
    return {
        "all": None,
        "causal": masks.causal,
        "window": masks.causal & (masks.window(20) | masks.sinks(3)),
        "left padding": masks.causal & masks.padding(valid),
        "right padding": masks.padding(valid.flip(1)),
    }


@pytest.mark.parametrize("name", patterns())
@pytest.mark.parametrize("keys", [77, 64, 5])
def test_pyramid_sparse_attention_at_level_1_is_exact(name: str, keys: int) -> None:
    q, k, v = inputs(min(52, keys), keys)
    mask = patterns(keys)[name]
    for by in ("quota", "threshold"):
        found = pyramid_sparse_attention(q, k, v, mask=mask, ends={1: 1.0}, by=by, **SMALL)
        for ours, theirs in zip(found, exact(q, k, v, mask), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("level", [2, 4, 8])
def test_pyramid_sparse_attention_pooling_identical_keys_and_values_changes_nothing(level: int) -> None:
    q, k, v = inputs(dtype=torch.float32)
    k, v = (x[:, :, ::8].repeat_interleave(8, 2)[:, :, :77] for x in (k, v))
    levels = torch.full((2, 4, 4, 10), level)
    for mask in patterns().values():
        found = pyramid_sparse_attention(q, k, v, mask=mask, levels=levels, **SMALL)
        for ours, theirs in zip(found, exact(q, k, v, mask), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def by_hand(q: Tensor, k: Tensor, v: Tensor, levels: Tensor) -> Tensor:
    """One block of queries after the other, over concatenated means."""
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in levels.shape[:3])).tolist():
        own = slice(16 * row, 16 * row + 16)
        keys, values, logs = [], [], []
        for block, level in enumerate(levels[b, h, row].tolist()):
            for start in range(8 * block, 8 * block + 8, level or 8):
                part = slice(start, min(start + level, k.shape[2]))
                if part.start < part.stop:
                    keys.append(k[b, h // 2, part].mean(0))
                    values.append(v[b, h // 2, part].mean(0))
                    logs.append(float(part.stop - part.start))
        scores = q[b, h, own] @ torch.stack(keys).T * q.shape[-1] ** -0.5
        scores = scores + torch.tensor(logs, dtype=q.dtype).log()
        out[b, h, own] = scores.softmax(-1) @ torch.stack(values)
    return out


def test_pyramid_sparse_attention_is_one_softmax_over_means_of_all_levels() -> None:
    q, k, v = inputs()
    levels = torch.tensor((0, 1, 2, 4, 8))[torch.randint(5, (2, 4, 4, 10))]
    levels[..., 0] = 8
    found, _ = pyramid_sparse_attention(q, k, v, levels=levels, **SMALL)
    torch.testing.assert_close(found, by_hand(q, k, v, levels))


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def cost(levels: Tensor) -> float:
    """Share of all pairs of blocks that is computed."""
    return float(torch.where(levels > 0, 1 / levels.clamp(min=1), 0.0).mean())


@pytest.mark.parametrize("mask", [None, masks.causal])
def test_pyramid_sparse_attention_at_equal_compute_is_nearer_than_keep_or_drop(mask: Any) -> None:
    """Over SmolLM2's queries, keys and values: whole blocks up to the share that costs as much."""
    pyramid, binary = [], []
    for q, k, v in recorded(384)[::4]:
        truth = exact(q, k, v, mask)[0]
        options: Any = {
            "mask": mask, "scale": 0.125, "q_offset": 0, "by": "threshold", "least": 0.06,
            "similar": SIMILAR, "q_block": 32, "k_block": 8,
        }  # fmt: skip
        levels = chosen_levels(q, k, ends=ENDS, generator=drawn(), **options)
        whole, share = levels * 0, 0.3
        while cost(whole) < cost(levels):
            share += 0.02
            whole = chosen_levels(q, k, ends={1: share}, generator=drawn(), **options)
        for of, found in ((levels, pyramid), (whole, binary)):
            out, _ = pyramid_sparse_attention(q, k, v, mask=mask, levels=of, q_block=32, k_block=8)
            found.append(relative_error(out, truth))
    assert sum(pyramid) < 0.95 * sum(binary)
    assert sum(a < b for a, b in zip(pyramid, binary, strict=True)) >= 6


@pytest.mark.parametrize("by", ["quota", "threshold"])
def test_pyramid_sparse_attention_reads_more_of_what_is_more_important(by: Any) -> None:
    weights = torch.rand(1, 2, 6, 40)
    levels = ranked(weights, ENDS, by, least=0.06)
    for row, found in zip(weights.flatten(0, 2), levels.flatten(0, 2), strict=True):
        in_order = found[row.argsort(descending=True)].tolist()
        finest = [level or 16 for level in in_order]
        assert finest == sorted(finest)
    if by == "quota":
        levels = ranked(weights, {1: 0.05, 2: 0.15, 4: 0.25, 8: 0.5}, by, least=0.06)
        assert [(levels[0, 0, 0] == level).sum().item() for level in (1, 2, 4, 8, 0)] == [2, 4, 4, 10, 20]


def test_pyramid_sparse_attention_importance_finds_the_block_that_matters() -> None:
    q, k, _ = inputs(64, 64)
    k[:, :, 24:32] = 8 * q[:, ::2, :1]
    q = q[:, :, :1].expand(-1, -1, 64, -1)
    found = importance(q, k, 16, 8, mask=None, scale=1.0, q_offset=0, generator=drawn())
    assert found.argmax(-1)[:, ::2].eq(3).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, 4, dtype=torch.float64))
    hidden = importance(q, k, 16, 8, mask=masks.causal, scale=1.0, q_offset=0, generator=drawn())
    assert hidden[:, :, 0, 2:].eq(0).all()


def test_pyramid_sparse_attention_keeps_unlike_keys_apart() -> None:
    q, k, v = inputs()
    options: Any = {"ends": {8: 1.0}, **SMALL}
    apart = pyramid_sparse_attention(q, k, v, similar=(1.0, 1.0, 1.0), **options)
    torch.testing.assert_close(apart, exact(q, k, v))
    together = pyramid_sparse_attention(q, k, v, similar=(1.0, 1.0, -2.0), **options)[0]
    pool = pyramid_sparse_attention(q, k, v, levels=torch.full((2, 4, 4, 10), 8), **SMALL)[0]
    torch.testing.assert_close(together, pool)


def test_pyramid_sparse_attention_always_reads_a_block_and_blind_rows_give_nothing() -> None:
    q, k, v = inputs()
    found, lse = pyramid_sparse_attention(q, k, v, ends={1: 0.0}, **SMALL)
    assert lse.isfinite().all()
    mask = masks.padding(torch.arange(77) < torch.tensor([[77], [0]]))
    found, lse = pyramid_sparse_attention(q, k, v, mask=mask, **SMALL)
    assert found[1].eq(0).all()
    assert lse[1].eq(-torch.inf).all()
    assert pyramid_sparse_attention(q, k[:, :, :0], v[:, :, :0])[0].eq(0).all()


def test_pyramid_sparse_attention_has_gradients_through_all_levels() -> None:
    q, k, v = (t.requires_grad_() for t in inputs(20, 24))
    levels = torch.tensor((1, 2, 8)).expand(2, 4, 2, 3)
    assert torch.autograd.gradcheck(
        lambda *qkv: pyramid_sparse_attention(*qkv, mask=masks.causal, levels=levels, **SMALL),
        (q, k, v), fast_mode=True,
    )  # fmt: skip


def test_pyramid_sparse_attention_steps_merge_with_what_is_cached() -> None:
    """Queries of whole blocks are what they are in one pass, where levels are given."""
    q, k, v = inputs(48, 80)
    levels = torch.tensor((1, 2, 4, 8))[torch.randint(4, (2, 4, 3, 10))]
    options: Any = {"mask": masks.causal, **SMALL}
    whole, _ = pyramid_sparse_attention(q, k, v, levels=levels, **options)
    last, _ = pyramid_sparse_attention(q[:, :, 32:], k, v, levels=levels[:, :, 2:], **options)
    torch.testing.assert_close(last, whole[:, :, 32:])


def test_pyramid_sparse_attention_takes_any_precision_autocast_and_compiling() -> None:
    q, k, v = inputs(dtype=torch.float32)
    options: Any = {"mask": masks.causal, **SMALL}
    levels = torch.ones(2, 4, 4, 10, dtype=torch.long)
    levels[..., ::2] = 2
    eager, _ = pyramid_sparse_attention(q, k, v, levels=levels, **options)
    half, _ = pyramid_sparse_attention(
        *(t.bfloat16() for t in (q, k, v)), levels=levels, **options
    )
    assert half.dtype == torch.bfloat16
    assert relative_error(half.float(), eager) < 0.02
    compiled = torch.compile(pyramid_sparse_attention, backend="eager")
    torch.testing.assert_close(compiled(q, k, v, levels=levels, **options)[0], eager)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = pyramid_sparse_attention(q, k, v, levels=levels, **options)
    assert relative_error(found.float(), eager) < 0.02


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"by": "rank"}, "by"), ({"k_block": 12}, "k_block"), ({"q_block": 0}, "q_block"),
        ({"ends": {3: 0.5}}, "ends"), ({"ends": {1: 1.5}}, "ends"), ({"ends": {}}, "ends"),
        ({"levels": torch.ones(2, 4, 1, 2, dtype=torch.long)}, "levels"),
        ({"levels": torch.full((2, 4, 1, 1), 3)}, "levels"),
        ({"mask": torch.ones(1, 1, 52, 77, dtype=torch.bool)}, "mask"),
    ],
)  # fmt: skip
def test_pyramid_sparse_attention_refuses_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=named):
        pyramid_sparse_attention(*inputs(), **options)


def test_pyramid_sparse_attention_means_of_what_is_left() -> None:
    x = torch.arange(10.0)[None, None, :, None]
    assert pooled(x, 4).flatten().tolist() == [1.5, 5.5, 8.5]
