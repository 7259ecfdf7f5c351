"""Lightning attention and TransNormer's layer: decays a head and layer, LRPE, the simple norm."""

from __future__ import annotations

import pytest
import torch

import attlas


def test_slopes_are_alibis_and_vanish_with_depth() -> None:
    options = {"dim": 32, "heads": 8, "layers": 4}
    layers = [attlas.make("lightning-attention-2", **options, layer_idx=n) for n in range(4)]
    slopes = torch.stack([-layer.log_decay for layer in layers])
    assert torch.allclose(slopes[0], 2.0 ** -torch.arange(1.0, 9.0) * (1 + 1e-5))
    assert (slopes.diff(dim=0) < 0).all()
    assert torch.allclose(slopes[3], 1e-5 * 2.0 ** -torch.arange(1.0, 9.0))


def test_outputs_are_the_decayed_sum_written_out() -> None:
    layer = attlas.make("lightning-attention-2", dim=16, heads=2, causal=True).double()
    x = torch.randn(1, 70, 16, dtype=torch.float64)
    q, k, v, _, inputs = layer.prepare(x)
    apart = torch.arange(70.0).double()[:, None] - torch.arange(70.0).double()
    kept = torch.exp(layer.log_decay.double()[:, None, None] * apart).tril()
    expected = layer.output((q @ k.mT * kept) @ v, inputs)
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_without_slopes_nothing_is_forgotten() -> None:
    layer = attlas.make("lightning-attention-2", dim=16, heads=2, causal=True, slope_scale=0.0)
    x = torch.randn(1, 20, 16)
    q, k, v, _, inputs = layer.prepare(x)
    assert torch.allclose(layer(x), layer.output((q @ k.mT).tril() @ v, inputs), atol=1e-5)


def test_lrpe_depends_on_distances_alone() -> None:
    layer = attlas.make("transnormer-llm", dim=16, heads=2, causal=True).eval()
    q, k = torch.randn(2, 1, 2, 1, 8)
    at = [torch.tensor([[place]]) for place in (0, 5, 100, 105)]
    products = [(layer.lrpe(q, b) * layer.lrpe(k, a)).sum(-1) for a, b in (at[:2], at[2:])]
    assert torch.allclose(*products, atol=1e-4)
    angles = layer.lrpe.theta * 5
    assert torch.allclose(products[0], (q * k * angles.cos()).sum(-1), atol=1e-5)


def test_only_the_first_layer_turns() -> None:
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


def test_refusals() -> None:
    with pytest.raises(ValueError, match="slope_scale must be at least 0"):
        attlas.make("lightning-attention-2", dim=16, heads=2, slope_scale=-1.0)
    with pytest.raises(ValueError, match="layers must be more than layer_idx=2"):
        attlas.make("lightning-attention-2", dim=16, heads=2, layers=2, layer_idx=2)
