"""Statistics of rows of weights are those of the map of all pairs, however it is masked and cut."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from attlas import masks, ops
from attlas.positions import ALiBi

MASSES = ("first", "itself", "previous", "distance", "duplicate", "induction", "copying")


def plainly(
    q: Tensor, k: Tensor, ids: Tensor | None = None, first: Any = 1, mask: Any = None,
    score_mod: Any = None, sinks: Tensor | None = None, valid: Tensor | None = None,
    scale: float | None = None, q_offset: int | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """All of it from the weights of all pairs, pair by pair."""
    offset = k.shape[2] - q.shape[2] if q_offset is None else q_offset
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = ops.scores_of(q, k, scale=scale, mask=mask, score_mod=score_mod, q_offset=offset)
    lse = scores.logsumexp(-1)
    whole = scores
    if sinks is not None:
        column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        whole = torch.cat([scores, column.to(scores.dtype)], -1)
    seen = scores > -torch.inf
    weights = (scores - whole.logsumexp(-1, keepdim=True)).exp().where(seen, 0.0)
    counted = torch.ones(len(q), q.shape[2], dtype=torch.bool) if valid is None else valid
    weights = weights * counted[:, None, :, None]
    batch, heads, queries, keys = scores.shape
    at, key = torch.arange(offset, offset + queries)[:, None], torch.arange(keys)
    until = torch.as_tensor(first).expand(batch)[:, None, None, None]
    pairs = {
        "first": key < until, "itself": key == at, "previous": key == at - 1,
        "distance": (key - at).abs(),
    }  # fmt: skip
    if ids is not None:
        known = {n: ids[:, n] for n in range(ids.shape[1])}

        def like(a: int, b: int) -> Tensor:
            if a not in known or b not in known:
                return torch.zeros(batch, dtype=torch.bool)
            return (known[a] == known[b]) & (known[a] >= 0)

        def told(of: Any) -> Tensor:
            rows = [[of(offset + i, j) for j in range(keys)] for i in range(queries)]
            return torch.stack([torch.stack(row, -1) for row in rows], -2)[:, None]

        pairs["duplicate"] = told(lambda i, j: like(i, j)) & (key < at)
        pairs["induction"] = told(lambda i, j: like(i, j - 1)) & (key <= at)
        pairs["copying"] = told(lambda i, j: like(i + 1, j)) & (key <= at)
    visible = seen & counted[:, None, :, None]
    found = {name: (weights * of).sum(-1) for name, of in pairs.items()}
    found |= {
        "lse": lse, "entropy": torch.special.entr(weights).sum(-1), "received": weights.sum(2),
        "seen_by": visible.sum(2),
        "peak": weights.amax(-1) if keys else weights.new_zeros(batch, heads, queries),
    }  # fmt: skip
    return found


def given(queries: int = 13, keys: int = 29, **kind: Any) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    kind = {"dtype": torch.float64, **kind}
    q, k = torch.randn(2, 4, queries, 8, **kind) * 2, torch.randn(2, 2, keys, 8, **kind)
    ids = torch.randint(0, 5, (2, keys + 1))
    ids[1, :3] = -1
    return q, k, ids


def some_masks(queries: int, keys: int) -> dict[str, Any]:
    torch.manual_seed(1)
    valid = torch.ones(2, keys, dtype=torch.bool)
    valid[1, :3] = False
    dense = torch.rand(2, 4, queries, keys) > 0.3
    dense[0, 1, 4] = False
    return {
        "all": None, "causal": masks.causal, "padded": masks.causal & masks.padding(valid),
        "window": masks.causal & (masks.window(5) | masks.sinks(2)), "dense": dense,
        "shared": dense[:1, :1], "keys": valid[:, None, None],
    }  # fmt: skip


@pytest.fixture(params=[2**20, 300], ids=["whole", "blocks"])
def block(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["attlas.ops.row_statistics"], "BLOCK", request.param)


@pytest.mark.parametrize("options", ["nothing", "alibi", "sink logits", "padded queries", "first"])
@pytest.mark.parametrize("name", some_masks(13, 29))
def test_statistics_are_those_of_the_map(name: str, options: str, block: None) -> None:
    q, k, ids = given()
    valid = torch.ones(2, 13, dtype=torch.bool)
    valid[1, :2] = False
    more: dict[str, Any] = {
        "nothing": {}, "alibi": {"score_mod": ALiBi(4).double().score_mod},
        "sink logits": {"sinks": torch.randn(4).double()}, "padded queries": {"valid": valid},
        "first": {"first": torch.tensor([2, 5])},
    }[options]  # fmt: skip
    call: dict[str, Any] = {"ids": ids, "mask": some_masks(13, 29)[name], **more}
    found = ops.row_statistics(q, k, **call, peak_at=True, received=True)
    expected = plainly(q, k, **call)
    for what, value in expected.items():
        own = getattr(found, what)
        torch.testing.assert_close(own.expand_as(value), value, atol=1e-12, rtol=1e-12, msg=what)
    scores = ops.scores_of(
        q, k, scale=8**-0.5, mask=call["mask"], score_mod=call.get("score_mod"), q_offset=16
    )
    dead = scores.amax(-1) == -torch.inf
    assert torch.equal(found.peak_at, scores.argmax(-1).masked_fill(dead, -1))


@pytest.mark.parametrize("offset", [-3, 0, 5, 40])
@pytest.mark.parametrize("mask", [None, masks.causal])
def test_queries_may_stand_anywhere(offset: int, mask: Any, block: None) -> None:
    q, k, ids = given()
    found = ops.row_statistics(q, k, ids=ids, mask=mask, q_offset=offset, received=True)
    for what, value in plainly(q, k, ids, mask=mask, q_offset=offset).items():
        own = getattr(found, what)
        torch.testing.assert_close(own.expand_as(value), value, atol=1e-12, rtol=1e-12, msg=what)


def test_what_was_not_asked_for_is_none() -> None:
    q, k, _ = given()
    found = ops.row_statistics(q, k)
    assert found.duplicate is found.induction is found.copying is None
    assert found.peak_at is found.received is found.seen_by is None


def test_nothing_to_see_gives_nothing() -> None:
    q, k, ids = given()
    found = ops.row_statistics(q, k[:, :, :0], ids=ids, peak_at=True, received=True)
    assert bool((found.lse == -torch.inf).all() & (found.peak_at == -1).all())
    assert not found.entropy.any()
    assert not found.copying.any()  # type: ignore[union-attr]
    assert found.received.shape == (2, 4, 0)  # type: ignore[union-attr]
    assert ops.row_statistics(q[:0], k[:0]).entropy.shape == (0, 4, 13)
    assert ops.row_statistics(q[:, :, :0], k, ids=ids).copying.shape == (2, 4, 0)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_twice_that_of_plain_operations(dtype: torch.dtype) -> None:
    """Plain operations are those of weights in float32, which half precision is widened to."""
    q, k, ids = given(65, 65, dtype=dtype)
    true = plainly(q.double(), k.double(), ids, mask=masks.causal)
    plain = plainly(q.float(), k.float(), ids, mask=masks.causal)
    found = ops.row_statistics(q, k, ids=ids, mask=masks.causal, received=True)
    for what, value in true.items():
        own, unit = getattr(found, what), torch.finfo(torch.float32).eps
        assert what == "seen_by" or own.dtype == torch.float32
        bound = 2 * (plain[what] - value).abs().max() + unit * value.abs().max()
        assert (own.double() - value).abs().max() <= bound, what


def test_extreme_scores_stay_finite() -> None:
    q, k, ids = given(dtype=torch.float32)
    found = ops.row_statistics(q * 2e3, k * 2, ids=ids, mask=masks.causal, received=True)
    assert all(bool(x.isfinite().all()) for x in found if x is not None)
    assert found.entropy.min() >= 0
    torch.testing.assert_close(found.peak, torch.ones_like(found.peak), atol=0.6, rtol=0)


def test_autocast_and_gradients_do_not_reach_it() -> None:
    q, k, ids = given(dtype=torch.float32)
    plain = ops.row_statistics(q, k, ids=ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.row_statistics(q.requires_grad_(), k, ids=ids)
    assert torch.equal(found.entropy, plain.entropy)
    assert not found.entropy.requires_grad


@pytest.mark.parametrize(
    ("word", "options"),
    [
        ("q and k", {"k": torch.randn(2, 2, 29, 6)}),
        ("heads of k", {"k": torch.randn(2, 3, 29, 8)}),
        ("mask", {"mask": torch.ones(2, 3, 13, 29, dtype=torch.bool)}),
        ("mask", {"mask": torch.ones(2, 4, 13, 29)}),
        ("ids", {"ids": torch.zeros(3, 29, dtype=torch.long)}),
        ("sinks", {"sinks": torch.zeros(3)}),
        ("valid", {"valid": torch.ones(2, 12, dtype=torch.bool)}),
        ("route", {"route": "fast"}),
        ("route='kernel'", {"route": "kernel"}),
    ],
)
def test_what_does_not_fit_is_refused_by_name(word: str, options: dict[str, Any]) -> None:
    q, k, _ = given(dtype=torch.float32)
    with pytest.raises((ValueError, TypeError), match=word):
        ops.row_statistics(q, **{"k": k, **options})
