"""key-driven-gqa: allocations that sum to the query heads; equal norms are grouped-query attention."""

from __future__ import annotations

import pytest
import torch

import attlas
from attlas.layers.heads.key_driven import allocation as _of_shares

X = torch.randn(3, 11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _layer(**options):
    torch.manual_seed(0)
    return attlas.make("key-driven-gqa", **{"dim": 32, "heads": 8, **options}).double().eval()


def allocation(norms: torch.Tensor, heads: int) -> torch.Tensor:
    return _of_shares(_layer().shares(norms), heads)


@pytest.mark.parametrize("heads", [4, 6, 8, 12, 16])
@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_key_driven_gqa_allocation_sums_to_the_heads(heads: int, groups: int) -> None:
    norms = torch.rand(500, groups, generator=torch.Generator().manual_seed(1)) + 0.1
    counts = allocation(norms, heads)
    assert (counts.sum(-1) == heads).all()
    assert (counts >= 0).all()


def test_key_driven_gqa_allocation_repairs_the_first_largest_and_smallest() -> None:
    norms = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    assert allocation(norms, 7)[1:].tolist() == [[0, 3, 4], [3, 4, 0]]  # 4 + 4: one off the first
    assert allocation(norms, 6)[0].tolist() == [0, 2, 4]
    assert allocation(torch.tensor([0.0, 1.0, 1.0, 1.0]), 4).tolist() == [1, 1, 1, 1]


def test_key_driven_gqa_equal_norms_are_grouped_query_attention() -> None:
    layer, plain = _layer(kv_heads=2), attlas.make("gqa", dim=32, heads=8, kv_heads=2).double()
    with torch.no_grad():  # the same rows in another order have the same norm
        first = layer.k_proj.weight[:4].clone()
        layer.k_proj.weight[4:] = first.flip(0)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(X), plain(X))


def test_key_driven_gqa_heads_go_where_the_norms_are() -> None:
    layer = _layer(kv_heads=4)
    with torch.no_grad():
        layer.k_proj.weight[:4] *= 100
    _, _, served, inputs = layer.prepare(X)
    _, k, v = layer.project(inputs)
    assert layer.counts(layer.norms(k, inputs))[:, 0].min() >= 6
    torch.testing.assert_close(served[:, :6], v[:, :1].expand(-1, 6, -1, -1))


def test_key_driven_gqa_allocates_for_sequences_or_batches() -> None:
    alone, together = _layer(kv_heads=4), _layer(kv_heads=4, over="batch")
    scaled = X * torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(alone(scaled)[:1], alone(scaled[:1]))
    inputs = together.prepare(scaled)[-1]
    counts = together.counts(together.norms(together.project(inputs)[1], inputs))
    assert (counts == counts[:1]).all()


def test_key_driven_gqa_refuses_what_it_cannot_honour() -> None:
    for options in ({"over": "layer"}, {"causal": True}, {"kv_heads": 3}):
        with pytest.raises((ValueError, TypeError), match=next(iter(options))):
            _layer(**options)


@pytest.mark.parametrize("name", ["kdgqa", "dgqa", "pgqa"])
def test_key_driven_gqa_adopts_the_means_of_multi_head_attention(name: str) -> None:
    """As the authors begin: from a trained model's heads, averaged by equal groups."""
    plain = attlas.make("mha", dim=32, heads=8, bias=True).double()
    layer, grouped = (
        attlas.make(n, dim=32, heads=8, kv_heads=2, bias=True).double() for n in (name, "gqa")
    )
    buffers = {n for n, _ in layer.named_buffers()}
    assert set(layer.load_from(plain.state_dict())) == buffers
    grouped.load_from(plain.state_dict())
    for parameter, theirs in zip(layer.parameters(), grouped.parameters(), strict=True):
        torch.testing.assert_close(parameter, theirs)
