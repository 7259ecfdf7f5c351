"""Lists of blocks as a mask: pair by pair, block by block, and through every route of attention."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
from torch import Tensor

from attlas import masks, ops
from attlas.masks import Mask


def chosen(batch: int = 2, heads: int = 4, rows: int = 17, columns: int = 33) -> Tensor:
    below = torch.arange(columns) * 16 <= torch.arange(rows)[:, None] * 32 + 31
    return (torch.rand(batch, heads, rows, columns) < 0.2) & below


def patterns(pages: Mask, valid: Tensor) -> dict[str, Mask]:
    return {
        "alone": pages,
        "causal": pages & masks.causal,
        "between": masks.causal & pages & masks.padding(valid),
        "with others": masks.causal & (pages | masks.window(20) | masks.sinks(3)),
        "hidden": masks.causal & ~pages,
    }


NAMES = ("alone", "causal", "between", "with others", "hidden")


@pytest.mark.parametrize("name", NAMES)
def test_every_route_of_attention_takes_it(name: str) -> None:
    some, valid = chosen(), torch.rand(2, 520) > 0.1
    mask = patterns(masks.pages(ops.as_lists(some), (32, 16)), valid)[name]
    q, k, v = (torch.randn(2, heads, 520, 8) for heads in (4, 2, 2))
    plain = ops.attend(q, k, v, mask=mask, route="reference")
    for route in ("auto", "lists", "sdpa", "blocks", "chunked"):
        found = ops.attend(q, k, v, mask=mask, route=route)
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=2e-6)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", NAMES)
def test_flex_takes_it(name: str) -> None:
    """Without shapes checked at run time, which it cannot trace."""
    jaxtyping.config.update("jaxtyping_disable", True)
    some, valid = chosen(), torch.rand(2, 520) > 0.1
    mask = patterns(masks.pages(ops.as_lists(some), (32, 16)), valid)[name]
    q, k, v = (torch.randn(2, heads, 520, 8) for heads in (4, 2, 2))
    plain = ops.attend(q, k, v, mask=mask, route="reference")
    found = ops.attend(q, k, v, mask=mask, route="flex")
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_told_from_pairs(name: str) -> None:
    mask = patterns(masks.pages(ops.as_lists(chosen()), (32, 16)), torch.rand(2, 520) > 0.1)[name]
    pairs = masks.dense(mask, 520, 520).expand(2, 4, -1, -1).float()
    some, every = masks.grid(mask, 520, 520, q_block=40, k_block=20)
    cells = pairs.unflatten(3, (26, 20)).unflatten(2, (13, 40))
    assert not ((cells.amax((3, 5)) > 0) & ~some).any()
    assert not (every & (cells.amin((3, 5)) == 0)).any()


def test_pairs_are_those_listed_and_lists_are_those_of_pairs() -> None:
    some = chosen()
    mask = masks.pages(ops.as_lists(some), (32, 16))
    whole = some.repeat_interleave(32, 2).repeat_interleave(16, 3)[:, :, :520, :520]
    assert torch.equal(masks.dense(mask, 520, 520), whole)


def test_queries_behind_a_cache_keep_their_places() -> None:
    q, k, v = (torch.randn(1, 2, 520, 8) for _ in range(3))
    mask = masks.pages(ops.as_lists(chosen(1, 2)), (32, 16)) & masks.causal
    whole = ops.attend(q, k, v, mask=mask, route="reference")
    for queries in (1, 40, 136, 519):
        last = ops.attend(q[:, :, -queries:], k, v, mask=mask, route="lists")
        torch.testing.assert_close(last, whole[:, :, -queries:], rtol=1e-4, atol=2e-6)


def test_what_was_listed_is_a_copy() -> None:
    blocks = torch.tensor([[[[0, 1]]]])
    mask = masks.pages(blocks, 4)
    blocks.fill_(-1)
    assert masks.dense(mask, 4, 8, q_offset=0).all()


def test_lists_of_none_are_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        masks.pages(torch.tensor([[[[1, 1]]]]), 4)
    with pytest.raises(TypeError, match="whole numbers"):
        masks.pages(torch.ones(1, 1, 1, 1), 4)
