"""pyramid-prefill: the part reads the levels that the op chooses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import tiny_models
from attlas import masks, ops
from attlas.attach import attach
from attlas.attach.thinned import Text
from attlas.ops.delta import attend_with_sinks
from attlas.ops.pyramid_sparse_attention import pyramid_sparse_attention
from attlas.parts.evict.snapkv import SnapKV
from attlas.parts.select.pyramid import PyramidPrefill

SMALL: Any = {"q_block": 4, "k_block": 8}


def text(queries: int, keys: int) -> Text:
    q, k, v = (torch.randn(2, n, t, 8) for n, t in ((4, queries), (2, keys), (2, keys)))
    return Text(3, q, k, v, scale=8**-0.5)


@pytest.mark.parametrize(("queries", "keys"), [(61, 61), (9, 60)])
@pytest.mark.parametrize("by", ["quota", "threshold"])
def test_pyramid_sparse_attention_of_a_prompt_is_the_op(by: Any, queries: int, keys: int) -> None:
    of = text(queries, keys)
    part = PyramidPrefill(by=by, ends=(0.2, 0.3, 0.5, 0.6), similar=(-1.0, -1.0, -1.0), seed=4, **SMALL)
    wanted, _ = pyramid_sparse_attention(
        of.q, of.k, of.v, mask=masks.causal, by=by, ends={1: 0.2, 2: 0.3, 4: 0.5, 8: 0.6},
        similar=(-1.0, -1.0, -1.0), generator=torch.Generator().manual_seed(4 + 3), **SMALL,
    )  # fmt: skip
    torch.testing.assert_close(part.attended(of), wanted)
    assert part.density[3].shape == (4,)
    assert part.density[3].min() > 0
    assert part.density[3].max() < 1


def test_pyramid_sparse_attention_of_a_prompt_is_exact_at_level_1() -> None:
    of = replace(text(50, 61), sinks=torch.randn(4))
    part = PyramidPrefill(ends=(1.0, 1.0, 1.0, 1.0), **SMALL)
    wanted = attend_with_sinks(
        of.q, of.k, of.v, mask=masks.causal, score_mod=None, scale=of.scale, sinks=of.sinks
    )
    torch.testing.assert_close(part.attended(of), wanted)
    assert part.density[3].tolist() == [1.0] * 4


def test_pyramid_sparse_attention_of_a_prompt_tells_the_share_that_it_reads() -> None:
    """All but the first and the last block of each row as means of 8: an eighth of their pairs."""
    q, k, v = (torch.randn(1, 2, 64, 8) for _ in range(3))
    part = PyramidPrefill(
        by="quota", ends=(0.0, 0.0, 0.0, 1.0), similar=(-1.0, -1.0, -1.0), q_block=8, k_block=8
    )
    part.attended(Text(0, q, k, v, scale=8**-0.5))
    whole, means = 2 * 8 - 1, sum(max(0, n - 2) for n in range(1, 9))
    torch.testing.assert_close(part.density[0], torch.full((2,), (whole + means / 8) / 36))


def test_pyramid_sparse_attention_of_a_prompt_refuses_by_name() -> None:
    for options, named in (
        ({"ends": (0.5, 1.0)}, "ends"), ({"similar": (0.5,)}, "similar"), ({"k_block": 12}, "k_block"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            PyramidPrefill(**options)
    of = text(9, 9)
    for changed in (
        replace(of, score_mod=lambda s, *_: s),
        replace(of, seen=ops.as_dense(masks.causal, 9, 9, 0, of.q.device)),
    ):
        with pytest.raises(ValueError, match="honours no"):
            PyramidPrefill().attended(changed)


def test_pyramid_sparse_attention_of_a_prompt_stands_beside_a_cache_that_drops_tokens() -> None:
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(tokens=40)
    cache = SnapKV(keep=0.5, window=4)
    with attach(model, cache):
        plain = tiny_models.greedy(model, ids)
    with attach(model, PyramidPrefill(ends=(1.0,) * 4, **SMALL), cache):
        assert tiny_models.greedy(model, ids) == plain
    with attach(model, PyramidPrefill(ends=(0.1, 0.2, 0.3, 0.4), by="quota", **SMALL), cache):
        assert len(tiny_models.greedy(model, ids)[0]) == len(plain[0])
