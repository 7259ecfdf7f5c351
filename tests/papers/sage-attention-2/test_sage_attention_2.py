"""sage-attention-2: smoothing changes nothing, few bits are enough after it and not before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attlas import masks, ops
from attlas.ops.sage_attention import FP8, LARGEST, quantise, sage_attention
from recorded_qkv import recorded

RAW: Any = {"smooth_q": False, "smooth_k": False}


def inputs(queries: int = 150, keys: int = 170, kv: int = 2, **kind: Any) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    k = torch.randn(2, kv, keys, 32) + 4 * torch.randn(2, kv, 1, 32)
    q = torch.randn(2, 4, queries, 32) + torch.randn(2, 4, 1, 32)
    return tuple(t.to(**kind) for t in (q, k, torch.randn(2, kv, keys, 24) + 1))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten().double(), b.flatten().double(), 0))


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Any = None) -> tuple[Tensor, Tensor]:
    return ops.attend(q, k, v, mask=mask, return_lse=True, route="reference")


def all_masks(queries: int = 150, keys: int = 170) -> dict[str, Any]:
    valid = torch.arange(keys) >= torch.tensor([[0], [60]])
    return {
        "all": None,
        "causal": masks.causal,
        "left padding": masks.causal & masks.padding(valid),
        "right padding": masks.padding(valid.flip(1)),
        "pairs": torch.rand(2, 4, queries, keys) > 0.4,
        "blind": torch.arange(queries)[:, None].ne(3).expand(1, 1, queries, keys),
    }


@pytest.mark.parametrize("name", all_masks())
@pytest.mark.parametrize("per", ["thread", "block"])
def test_sage_attention_2_smoothing_alone_leaves_the_output_unchanged(name: str, per: Any) -> None:
    q, k, v = inputs()
    mask = all_masks()[name]
    found = sage_attention(q, k, v, mask=mask, bits=None, values=None, smooth_q=True, per=per)
    for ours, theirs in zip(found, exact(q, k, v, mask), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_sage_attention_2_smoothing_is_needed_for_recorded_queries_and_keys(bits: Any) -> None:
    """SmolLM2, every third layer: in 8 bits each above 0.99, in 4 bits 0.98 on average, and much less
    without; with outlying channels in every key, as keys with biases have, 8 bits are not enough."""
    smoothed, plain, biased = [], [], []
    for q, k, v in recorded(384)[::3]:
        outlying = torch.zeros(k.shape[-1])
        outlying[::16] = 240.0
        truth = exact(q, k, v, masks.causal)[0]
        for found, keys, kind in ((smoothed, k, {}), (plain, k, RAW), (biased, k + outlying, RAW)):
            out, _ = sage_attention(q, keys, v, mask=masks.causal, bits=bits, **kind)
            found.append(cosine(out, truth))
    with_it, without, outliers = (torch.tensor(x) for x in (smoothed, plain, biased))
    if bits == 8:
        assert with_it.min() > 0.998
        assert outliers.mean() < 0.97
    else:
        assert with_it.mean() > 0.98
        assert without.mean() < 0.9
        assert outliers.mean() < 0.75
    out, _ = sage_attention(q, k + outlying, v, mask=masks.causal, bits=bits)
    assert cosine(out, truth) > smoothed[-1] - 0.002


def test_sage_attention_2_more_bits_and_smaller_groups_come_nearer() -> None:
    q, k, v = inputs()
    truth = exact(q, k, v)[0]
    kinds: Any = (
        (4, "block", "fp8"), (4, "thread", "fp8"), (8, "thread", "fp8"), (8, "thread", "fp16"),
        (8, "thread", None), (None, "thread", None),
    )  # fmt: skip
    outs = [sage_attention(q, k, v, bits=b, per=per, values=held)[0] for b, per, held in kinds]
    errors = [1 - cosine(out, truth) for out in outs]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("groups", "near"), [(1, 1), (8, 1), (4, 2)])
def test_sage_attention_2_integers_are_within_half_a_unit(bits: int, groups: int, near: int) -> None:
    x = torch.randn(1, 2, 77, 16)
    x[:, :, 40:] = 0
    found = quantise(x, bits, 16, groups=groups, near=near)
    assert found.codes.abs().max() == LARGEST[bits]
    assert found.scales.isfinite().all()
    back = found.codes * found.each[..., None]
    assert ((back - x).abs() <= 0.50001 * found.each[..., None]).all()


def test_sage_attention_2_queries_of_a_thread_share_a_scale_and_no_others() -> None:
    x = torch.ones(1, 1, 64, 8)
    x[0, 0, 32 + 3] = 100.0
    each = quantise(x, 8, 32, groups=8).each[0, 0]
    assert (each > 0.1).nonzero()[:, 0].tolist() == [35, 43, 51, 59]
    each = quantise(x, 8, 32, groups=4, near=2).each[0, 0]
    assert (each > 0.1).nonzero()[:, 0].tolist() == [34, 35, 42, 43, 50, 51, 58, 59]


def test_sage_attention_2_values_fill_the_range_of_fp8() -> None:
    from attlas.ops.sage_attention import _rounded_values

    codes, scale, mean = _rounded_values(torch.randn(1, 2, 50, 8) * 1e3 + 5e3, "fp8", True)
    assert codes.float().abs().amax(2).eq(FP8).all()
    assert scale.shape == mean.shape == (1, 2, 1, 8)


def test_sage_attention_2_parts_merge_and_steps_are_rows_of_one_pass() -> None:
    q, k, v = inputs()
    halves = zip(k.split(100, 2), v.split(100, 2), strict=True)
    parts = [sage_attention(q, a, b, bits=8) for a, b in halves]
    whole = exact(q, k, v)
    out, lse = ops.merge(parts)
    assert cosine(out, whole[0]) > 0.999
    torch.testing.assert_close(lse, whole[1], atol=0.05, rtol=0.01)
    # A run of queries shares scales: a step of whole runs is what these rows are in one pass.
    options: Any = {"mask": masks.causal, "bits": 8}
    last = sage_attention(q[:, :, 128:], k, v, **options)[0]
    torch.testing.assert_close(last, sage_attention(q, k, v, **options)[0][:, :, 128:])


def test_sage_attention_2_rows_that_see_nothing_give_nothing() -> None:
    q, k, v = inputs()
    out, lse = sage_attention(q, k, v, mask=all_masks()["blind"])
    assert out[:, :, 3].eq(0).all()
    assert lse[:, :, 3].eq(-torch.inf).all()
    out, lse = sage_attention(q, k[:, :, :0], v[:, :, :0])
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()
    same = sage_attention(q, k * 0, v * 0 + 2)[0]
    assert same.eq(2).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sage_attention_2_gives_what_it_takes_in_any_precision(dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype=dtype)
    out, lse = sage_attention(q, k, v, bits=8)
    assert out.dtype == dtype
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    assert cosine(out, exact(*(t.double() for t in (q, k, v)))[0]) > 0.999


def test_sage_attention_2_is_neither_rounded_by_autocast_nor_changed_by_compiling() -> None:
    q, k, v = inputs(40, 70)
    eager = sage_attention(q, k, v, mask=masks.causal)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sage_attention(q, k, v, mask=masks.causal)[0].equal(eager)
    compiled = torch.compile(sage_attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, mask=masks.causal)[0], eager)
    meta = sage_attention(*(t.to("meta") for t in (q, k, v)), mask=masks.causal)
    assert meta[0].shape == eager.shape


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"bits": 5}, "bits"), ({"values": "fp4"}, "values"), ({"per": "tensor"}, "per"),
        ({"q_run": 12}, "q_run"), ({"k_block": 0}, "k_block"), ({"route": "kernel"}, "CUDA"),
        ({"route": "fastest"}, "route"), ({"mask": torch.zeros(1, 1, 150, 170)}, "mask"),
    ],
)  # fmt: skip
def test_sage_attention_2_refuses_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(Exception, match=named):
        sage_attention(*inputs(), **options)
    q, k, v = inputs()
    with pytest.raises(ValueError, match="k wants a gradient"):
        sage_attention(q, k.requires_grad_(), v)
    with pytest.raises(ValueError, match="heads"):
        sage_attention(q[:, :3], k.detach(), v)
