"""magnitude-aware-linear-attention: rows sum to 1, and what a query weighs depends on its length."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import elu

import attlas


def _layer(name: str = "mala", **options):
    torch.manual_seed(0)
    layer = attlas.make(name, **{"dim": 16, "heads": 2, **options}).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return layer


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_magnitude_aware_linear_attention_rows_sum_to_one(size: float, kv_heads: int) -> None:
    layer = _layer(rotary=False, kv_heads=kv_heads)
    weights = layer.weights(size * torch.randn(2, 20, 16).double())
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-5, rtol=0)


def test_magnitude_aware_linear_attention_is_the_affine_function() -> None:
    layer = _layer(rotary=False)
    x = torch.randn(2, 12, 16).double()
    q, k, *_ = layer.prepare(x)
    similar = (elu(q) + 1) @ (elu(k) + 1).mT / (12 * 8**0.5)
    z = similar.sum(-1, keepdim=True)
    torch.testing.assert_close(layer.weights(x), (1 + 1 / (z + 1e-6)) * similar - z / 12)


def test_magnitude_aware_linear_attention_scores_depend_on_the_query_length() -> None:
    """Longer queries spread the weights in proportion; linear attention's stay as they are."""
    layer, plain = _layer(rotary=False, eps=1e-12), _layer("linear-attention")
    plain.load_from(layer.state_dict())
    x = torch.randn(2, 12, 16).double()
    q, k, _, inputs = layer.prepare(x)
    features = elu(q) + 1

    def weights(of, size: float):
        return of.weigh(_unmapped(size * features), k, inputs)

    for size in (1.0, 4.0):
        same = weights(plain, size)
        torch.testing.assert_close(same, weights(plain, 1.0))
        # What is added to linear attention's weights has mean 0 and grows with the query.
        added = weights(layer, size) - same
        torch.testing.assert_close(added, size * (weights(layer, 1.0) - weights(plain, 1.0)))
        assert added.abs().max() > 0.01
    # Short queries have nothing added.
    torch.testing.assert_close(weights(layer, 1e-6), weights(plain, 1.0), atol=1e-5, rtol=0)


def _unmapped(features: torch.Tensor) -> torch.Tensor:
    """What elu + 1 makes these features of."""
    return torch.where(features > 1, features - 1, features.log())


def test_magnitude_aware_linear_attention_rotates_numerators_alone() -> None:
    layer, still = _layer(grid=(3, 4)), _layer(grid=(3, 4), rotary=False)
    x = torch.randn(1, 12, 16).double()
    rotated, plain = layer.weights(x), still.weights(x)
    # A token and itself are not turned against each other.
    torch.testing.assert_close(rotated.diagonal(0, -2, -1), plain.diagonal(0, -2, -1))
    assert (rotated - plain).abs().max() > 1e-3


def test_magnitude_aware_linear_attention_begins_small_and_gated() -> None:
    layer = attlas.make("mala", dim=64, heads=2)
    for module in (layer.q_proj, layer.gate_proj, layer.o_proj, layer.conv):
        assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert (module.bias == 0).all()
    torch.nn.init.zeros_(layer.gate_proj.weight)
    assert (layer(torch.randn(1, 9, 64)) == 0).all()
