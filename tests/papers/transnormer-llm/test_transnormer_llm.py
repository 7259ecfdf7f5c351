"""TransNormer's layer: LRPE, and the simple norm."""

from __future__ import annotations

import torch

import attlas


def test_lrpe_depends_on_distances_alone() -> None:
    layer = attlas.make("transnormer-llm", dim=16, heads=2, causal=True).eval()
    q, k = torch.randn(2, 1, 2, 1, 8)
    at = [torch.tensor([[place]]) for place in (0, 5, 100, 105)]
    products = [(layer.lrpe(q, b) * layer.lrpe(k, a)).sum(-1) for a, b in (at[:2], at[2:])]
    assert torch.allclose(*products, atol=1e-4)
    angles = layer.lrpe.theta * 5
    assert torch.allclose(products[0], (q * k * angles.cos()).sum(-1), atol=1e-5)


def test_only_the_first_layer_rotates() -> None:
    assert attlas.make("transnormer-llm", dim=16, heads=2).lrpe is not None
    assert attlas.make("transnormer-llm", dim=16, heads=2, layer_idx=1).lrpe is None


def test_the_norm_takes_the_divisors_place() -> None:
    """Outputs do not change with the size of values, as they would not with a divisor for weights."""
    layer = attlas.make("transnormer-llm", dim=16, heads=2, causal=True, eps=1e-12).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.v_proj.weight *= 7.0
    assert torch.allclose(layer(x), before, atol=1e-6)
