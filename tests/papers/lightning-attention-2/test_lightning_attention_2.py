"""Lightning attention: decays of a head and layer."""

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
    q, k, v, inputs = layer.prepare(x)
    apart = torch.arange(70.0).double()[:, None] - torch.arange(70.0).double()
    kept = torch.exp(layer.log_decay.double()[:, None, None] * apart).tril()
    expected = layer.output((q @ k.mT * kept) @ v, inputs)
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_without_slopes_nothing_is_forgotten() -> None:
    layer = attlas.make("lightning-attention-2", dim=16, heads=2, causal=True, slope_scale=0.0)
    x = torch.randn(1, 20, 16)
    q, k, v, inputs = layer.prepare(x)
    assert torch.allclose(layer(x), layer.output((q @ k.mT).tril() @ v, inputs), atol=1e-5)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="slope_scale must be at least 0"):
        attlas.make("lightning-attention-2", dim=16, heads=2, slope_scale=-1.0)
    with pytest.raises(ValueError, match="layers must be more than layer_idx=2"):
        attlas.make("lightning-attention-2", dim=16, heads=2, layers=2, layer_idx=2)


@pytest.mark.parametrize("name", ["lightning-attention-2", "retention"])
def test_values_of_their_own_width_and_the_same_step_by_step(name: str) -> None:
    layer = attlas.make(name, dim=16, heads=2, head_dim=4, value_dim=12, causal=True).double()
    assert layer.v_proj.out_features == layer.o_proj.in_features == 24
    x = torch.randn(2, 13, 16, dtype=torch.float64)
    *_, v, inputs = layer.prepare(x)
    torch.testing.assert_close(layer(x), layer.output(layer.weights(x) @ v, inputs))
    cache = layer.init_cache()
    steps = [layer(part, cache=cache) for part in x.split([5, 1, 7], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), layer(x))
