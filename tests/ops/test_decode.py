"""`decode` by its reference route, against `attend` over all that its segments hold, written out."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attlas.ops.attend import attend
from attlas.ops.decode import decode
from attlas.ops.pages import best_pages, page_bounds, page_scores
from attlas.ops.quantize import encode
from attlas.ops.reference import merge
from attlas.ops.segments import Coded, Dense, Listed, Ragged

KINDS = ("dense", "ragged", "listed", "coded", "coded pages")
#: What of a head is held: keys, values, which query sees which, biases.
Held = tuple[Tensor, Tensor, Tensor, Tensor]

shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2), "kv_heads": st.integers(1, 2), "group": st.integers(1, 3),
        "queries": st.integers(1, 4), "slots": st.sampled_from((1, 5, 150)),
        "seed": st.integers(0, 99),
    }
)  # fmt: skip
flags = st.fixed_dictionaries(
    {
        "lengths": st.booleans(), "causal": st.booleans(), "bias": st.booleans(),
        "visible": st.sampled_from((None, "one", "keys", "queries")),
        "page": st.sampled_from((1, 4)), "per_query_head": st.booleans(),
        "bits": st.sampled_from((8, 3, 1)), "token_group": st.sampled_from((1, 32)),
    }
)  # fmt: skip
PLAIN = {
    "batch": 2, "kv_heads": 2, "group": 2, "queries": 3, "slots": 40, "seed": 0, "lengths": False,
    "causal": False, "bias": False, "visible": None, "page": 1, "per_query_head": False, "bits": 8,
    "token_group": 1,
}  # fmt: skip


def segment(kind: str, case: dict[str, Any], dtype: torch.dtype = torch.float64) -> Any:
    pair, slots = (case["batch"], case["kv_heads"]), case["slots"]
    heads = case["kv_heads"] * case["group"]
    lengths = torch.randint(0, slots + 1, pair) if case["lengths"] else None
    if kind == "ragged":
        counts = torch.randint(0, slots + 1, pair)
        starts = (counts + 2).flatten().cumsum(0).view(pair) - counts
        total = int(counts.sum()) + 2 * counts.numel()
        k, v = torch.randn(total, 8, dtype=dtype), torch.randn(total, 16, dtype=dtype)
        bias = torch.randn(total, dtype=dtype) if case["bias"] else None
        return Ragged(k, v, starts, counts, int(counts.max()), bias)
    k, v = (torch.randn(*pair, slots, width, dtype=dtype) for width in (8, 16))
    if kind == "dense":
        seen = {"one": 1, "keys": case["kv_heads"], "queries": heads}.get(case["visible"])
        visible = None if seen is None else torch.rand(pair[0], seen, case["queries"], slots) > 0.4
        bias = torch.randn(*pair, slots, dtype=dtype) if case["bias"] else None
        return Dense(k, v, lengths, visible, case["causal"], bias)
    lists = heads if case["per_query_head"] else case["kv_heads"]
    pages = -(-slots // case["page"])
    index = torch.rand(pair[0], lists, pages).argsort(-1)[..., : max(1, pages // 2)].int()
    index = index.masked_fill(torch.rand(index.shape) > 0.8, -1)
    if kind == "listed":
        return Listed(k, v, index, case["page"], lengths)
    of_k = encode(k, case["bits"], token_group=case["token_group"])
    of_v = encode(v, case["bits"], channel_group=8)
    return Coded(of_k, of_v, lengths, *((index, case["page"]) if kind == "coded pages" else ()))


def written_out(s: Any, b: int, head: int, heads: int, queries: int) -> Held:
    """What one query head may read of a segment, slot by slot."""
    if isinstance(s, Coded):
        k, v = s.k.read(), s.v.read()
    else:
        k, v = s.k, s.v
    kv_heads = s.offsets.shape[1] if isinstance(s, Ragged) else k.shape[1]
    of = head * kv_heads // heads
    if isinstance(s, Ragged):
        start, count = int(s.offsets[b, of]), int(s.lengths[b, of])
        k, v, slots = k[start : start + count], v[start : start + count], list(range(count))
        bias = None if s.bias is None else s.bias[start : start + count]
    else:
        k, v = k[b, of], v[b, of]
        slots = list(range(len(k) if s.lengths is None else int(s.lengths[b, of])))
        bias = s.bias[b, of] if isinstance(s, Dense) and s.bias is not None else None
    index = getattr(s, "index", None)
    if index is not None:
        listed = index[b, head * index.shape[1] // heads].tolist()
        valid = set(slots)
        slots = [
            n for p in listed if p >= 0 for n in range(p * s.page, (p + 1) * s.page) if n in valid
        ]
    seen = torch.ones(queries, len(slots), dtype=torch.bool)
    if isinstance(s, Dense):
        for i in range(queries):
            for j, slot in enumerate(slots):
                if s.causal and slot > len(k) - queries + i:
                    seen[i, j] = False
                if s.visible is not None:
                    seen[i, j] &= s.visible[b, head * s.visible.shape[1] // heads, i, slot]
    bias = k.new_zeros(len(k)) if bias is None else bias
    return k[slots], v[slots], seen, bias[slots]


def right(q: Tensor, segments: list[Any], scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of `attend` over all segments, head by head."""
    batch, heads, queries, _ = q.shape
    outs, lses = q.new_empty(batch, heads, queries, 16), q.new_empty(batch, heads, queries)
    for b in range(batch):
        for h in range(heads):
            parts = zip(*(written_out(s, b, h, heads, queries) for s in segments), strict=True)
            ks, vs, seen, biases = (list(part) for part in parts)
            bias = torch.cat(biases)
            # A slot that nobody sees, as attend takes no empty keys.
            k, v = torch.cat([*ks, ks[0].new_zeros(1, 8)]), torch.cat([*vs, vs[0].new_zeros(1, 16)])
            mask = torch.cat([*seen, torch.zeros(queries, 1, dtype=torch.bool)], dim=1)
            bias = torch.cat([bias, bias.new_zeros(1)])

            def biased(
                score: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor, bias: Tensor = bias
            ) -> Tensor:
                return score + bias[n]

            out, lse = attend(
                q[b, h][None, None], k[None, None], v[None, None], mask=mask[None, None],
                score_mod=biased, scale=scale, return_lse=True, route="reference",
            )  # fmt: skip
            outs[b, h], lses[b, h] = out[0, 0], lse[0, 0]
    return outs, lses


def query(case: dict[str, Any], dtype: torch.dtype = torch.float64) -> Tensor:
    heads = case["kv_heads"] * case["group"]
    return torch.randn(case["batch"], heads, case["queries"], 8, dtype=dtype)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, flag=flags, kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
def test_decode_attends_to_all_that_its_segments_hold(shape: Any, flag: Any, kinds: Any) -> None:
    case = {**shape, **flag}
    torch.manual_seed(case["seed"])
    q, segments = query(case), [segment(kind, case) for kind in kinds]
    module = importlib.import_module("attlas.ops.decode")
    with patch.multiple(module, AT_ONCE=1, SCORES=1):  # 64 at once
        found = decode(q, segments, scale=0.3, route="reference")
    if any(len(list(s.blocks(1, 64))) for s in segments):
        torch.testing.assert_close(found, right(q, segments, 0.3))


@pytest.mark.parametrize("kind", KINDS)
def test_segments_alone_merge_to_decode_of_both_in_any_order(kind: str) -> None:
    case = {**PLAIN, "lengths": True}
    q, one, other = query(case), segment(kind, case), segment("dense", case)
    both = decode(q, [one, other])
    torch.testing.assert_close(decode(q, [other, one]), both)
    torch.testing.assert_close(merge([decode(q, [one]), decode(q, [other])]), both)


def test_sinks_are_a_slot_without_a_value() -> None:
    q, held, sinks = query(PLAIN), segment("dense", PLAIN), torch.randn(4, dtype=torch.float64)
    out, lse = decode(q, [held], sinks=sinks)
    # A head's sink as one more slot: key 0, value 0, and its logit as bias.
    ones = q.new_zeros(2, 4, 1, 8), q.new_zeros(2, 4, 1, 16)
    k, v = (x.repeat_interleave(2, dim=1) for x in (held.k, held.v))
    sink = Dense(*ones, bias=sinks.expand(2, 4)[..., None])
    torch.testing.assert_close((out, lse), decode(q, [Dense(k, v), sink]))


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])])
def test_a_query_that_sees_nothing_gives_nothing(sinks: Tensor | None) -> None:
    case = {**PLAIN, "batch": 1}
    hidden = torch.zeros(1, 1, 3, 40, dtype=torch.bool)
    hidden[:, :, 1] = True
    k, v = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 16)
    out, lse = decode(query(case, torch.float32), [Dense(k, v, visible=hidden)], sinks=sinks)
    for row in (0, 2):
        assert out[:, :, row].eq(0).all()
        expected = torch.full((4,), -torch.inf) if sinks is None else sinks
        torch.testing.assert_close(lse[0, :, row], expected)
    assert out[:, :, 1].ne(0).all()
    assert lse[:, :, 1].isfinite().all()


def test_scale_is_that_of_the_width_unless_given() -> None:
    q, held = query(PLAIN), segment("dense", PLAIN)
    torch.testing.assert_close(decode(q, [held]), decode(q, [held], scale=8**-0.5))
    assert not torch.allclose(decode(q, [held])[0], decode(q, [held], scale=1.0)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_near(kind: str) -> None:
    q, held = query(PLAIN, torch.bfloat16), segment(kind, PLAIN, torch.bfloat16)
    out, lse = decode(q, [held])
    exact, exact_lse = right(q.double(), [_double(held)], 8**-0.5)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=5e-2, atol=3e-2)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-2, atol=2e-2)


def _double(held: Any) -> Any:
    if isinstance(held, Coded):
        k, v = (replace(codes, dtype=torch.float64) for codes in (held.k, held.v))
    else:
        k, v = held.k.double(), held.v.double()
    return replace(held, k=k, v=v)


def test_calls_that_make_no_sense_are_refused() -> None:
    q, held = query(PLAIN), segment("dense", PLAIN)
    with pytest.raises(ValueError, match="at least one segment"):
        decode(q, [])
    with pytest.raises(ValueError, match="route='triton' cannot take this call"):
        decode(q, [held], route="triton")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 33), st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_no_key_of_a_page_exceeds_the_pages_score(
    n: int, page: int, shared: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 2, n, 8)
    low, high = page_bounds(k, page)
    bound = page_scores(q, low, high, shared=shared)
    grouped = q.unflatten(1, (2, 2))
    by_hand = torch.maximum(grouped * low[:, :, None], grouped * high[:, :, None]).sum(-1)
    by_hand = by_hand.amax(2) if shared else by_hand.flatten(1, 2)
    torch.testing.assert_close(bound, by_hand)
    reached = (q @ k.repeat_interleave(2, dim=1).mT)[:, :, 0]
    bound = bound.repeat_interleave(2, dim=1) if shared else bound
    for token in range(n):
        assert (reached[..., token] <= bound[..., token // page] + 1e-4).all()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.sampled_from((-torch.inf, -1.0, -0.0, 0.0, 1.0, 2.5)), min_size=1, max_size=12),
    st.integers(0, 13),
)
def test_the_best_pages_come_ascending_and_the_earlier_of_equals_first(
    row: list[float], count: int
) -> None:
    order = sorted(range(len(row)), key=lambda page: (-row[page], page))
    chosen = [page if row[page] > -torch.inf else -1 for page in sorted(order[:count])]
    found = best_pages(torch.tensor(row)[None, None], count)
    assert found.dtype == torch.int32
    assert found[0, 0].tolist() == chosen
