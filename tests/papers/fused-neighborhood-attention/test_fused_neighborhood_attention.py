"""What the catalogue asks of fused neighbourhood attention, clause by clause."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attlas import masks, ops
from attlas.contract.layers.numbers import LargestTensor
from attlas.ops.fused_neighborhood import FORMS, fused_neighborhood

GRIDS: list[dict[str, Any]] = [
    {"shape": 300, "window": 7},
    {"shape": 301, "window": 6, "dilation": 4, "causal": True},
    {"shape": (18, 21), "window": (5, 8)},
    {"shape": (18, 21), "window": (3, 4), "dilation": (2, 5), "causal": (True, False)},
    {"shape": (7, 8, 9), "window": (3, 4, 5), "causal": (False, False, True)},
]


def qkv(tokens: int, heads: int = 4, kv: int = 2, width: int = 6, **kind: Any) -> list[Tensor]:
    return [
        torch.randn(2, h, tokens, w, **kind) for h, w in ((heads, 8), (kv, 8), (kv, width))
    ]


def tokens_of(grid: dict[str, Any]) -> int:
    return int(torch.tensor(grid["shape"]).prod())


@pytest.mark.parametrize("grid", GRIDS)
def test_both_forms_agree_with_the_masked_dense_reference(grid: dict[str, Any]) -> None:
    """Output, lse and gradients to 1e-4 in float32, as asked, and to 1e-12 in float64."""
    count = tokens_of(grid)
    mask = masks.neighborhood(**grid)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        inputs = qkv(count, dtype=dtype)
        found = []
        for form in (None, *FORMS):
            given = [t.clone().requires_grad_() for t in inputs]
            if form is None:
                out, lse = ops.reference(*given, mask=mask, scale=8**-0.5)
            else:
                out, lse = fused_neighborhood(*given, **grid, form=form, return_lse=True)
            (out.square().sum() + lse.exp().sum()).backward()
            found.append([out, lse, *(t.grad for t in given)])
        for ours in found[1:]:
            for one, wanted in zip(ours, found[0], strict=True):
                torch.testing.assert_close(one, wanted, atol=bound, rtol=bound)


@pytest.mark.parametrize("form", FORMS)
def test_every_query_sees_exactly_as_many_keys_as_its_window_has(form: Any) -> None:
    """Told by values that are each key's own unit vector: the weights themselves come out."""
    window, count = (3, 4), 6 * 7
    q, k = torch.randn(1, 1, count, 8), torch.randn(1, 1, count, 8)
    v = torch.eye(count)[None, None]
    grid: dict[str, Any] = {"shape": (6, 7), "window": window, "form": form}
    weights = fused_neighborhood(q, k, v, **grid)[0, 0]
    assert ((weights > 0).sum(-1) == 12).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(count))
    causal = fused_neighborhood(q, k, v, **grid, causal=(True, False))[0, 0] > 0
    rows = causal.view(6, 7, 6, 7)
    for row in range(6):  # the axis that is not causal keeps all 4, the causal one grows to its 3
        seen = rows[row].any(0).any(-1)
        assert seen.nonzero()[:, 0].tolist() == list(range(max(0, row - 2), row + 1))
        assert (rows[row].sum((1, 2)) == 4 * min(row + 1, 3)).all()


@pytest.mark.parametrize("form", FORMS)
def test_queries_see_their_nearest_keys(form: Any) -> None:
    """At borders the window is shifted inwards."""
    v = torch.eye(9)[None, None]
    seen = fused_neighborhood(v[..., :4], v[..., :4], v, shape=9, window=5, form=form)[0, 0] > 0
    first = [max(0, min(4, x - 2)) for x in range(9)]
    assert [row.nonzero()[:, 0].tolist() for row in seen] == [list(range(f, f + 5)) for f in first]


def _largest(window: int, form: str, backward: bool) -> int:
    q, k, v = (t.requires_grad_(backward) for t in qkv(64 * 64, 1, 1, 8))
    with LargestTensor() as seen:
        out = fused_neighborhood(q, k, v, shape=(64, 64), window=window, form=form)
        if backward:
            out.sum().backward()
    return seen.elements


@pytest.mark.parametrize("backward", [False, True])
def test_the_fused_forms_memory_does_not_grow_with_the_window(backward: bool) -> None:
    assert _largest(33, "fused", backward) <= _largest(9, "fused", backward)
    assert _largest(33, "fused", backward) < 0.05 * 64**4


def test_the_unfused_forms_memory_does() -> None:
    assert _largest(9, "unfused", False) > 5 * _largest(3, "unfused", False)


def test_the_fused_form_visits_only_tiles_that_the_windows_touch() -> None:
    """Keys that no window of a tile touches may be anything."""
    q, k, v = qkv(64 * 64, 1, 1)
    wanted = fused_neighborhood(q, k, v, shape=(64, 64), window=9)
    for x in (k, v):
        x.view(2, 1, 64, 64, -1)[:, :, 32:] = torch.nan
    out = fused_neighborhood(q, k, v, shape=(64, 64), window=9)
    top = (slice(None), slice(None), slice(16 * 64))
    torch.testing.assert_close(out[top], wanted[top], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forms_err_at_most_twice_as_much_as_the_plain_computation(dtype: torch.dtype) -> None:
    q, k, v = qkv(24 * 24, dtype=dtype)
    grid: dict[str, Any] = {"shape": (24, 24), "window": (7, 5)}
    mask = masks.neighborhood(**grid)
    truth = ops.reference(q.double(), k.double(), v.double(), mask=mask, scale=8**-0.5)[0]
    plain = ops.reference(q, k, v, mask=mask, scale=8**-0.5)[0]
    ulp = torch.finfo(dtype).eps * truth.abs().max()
    for form in FORMS:
        out = fused_neighborhood(q, k, v, **grid, form=form)
        assert out.dtype == dtype
        assert (out - truth).abs().max() <= 2 * (plain - truth).abs().max() + ulp


@pytest.mark.parametrize(
    ("options", "said"),
    [({"form": "tiled"}, "form"), ({"window": 65}, "window=.* must fit"), ({"shape": 63}, "q must be"),
     ({"dilation": 0}, "dilation takes")],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fused_neighborhood(*qkv(64), **{"shape": 64, "window": 3, **options})
