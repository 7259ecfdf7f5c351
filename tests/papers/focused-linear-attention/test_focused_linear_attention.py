"""focused-linear-attention: norms kept, directions sharpened, a map whose rank exceeds a head's width."""

from __future__ import annotations

import pytest
import torch
from torch.linalg import matrix_rank, vector_norm

import attlas
from attlas import Attention
from attlas.layers.linear.focused_linear import focus


def _layer(**options):
    torch.manual_seed(0)
    layer = (
        attlas.make("focused-linear-attention", **{"dim": 16, "heads": 2, **options})
        .double()
        .eval()
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return layer


@pytest.mark.parametrize("power", [1.0, 3.0, 8.0])
def test_focused_linear_attention_keeps_norms_and_sharpens_directions(power: float) -> None:
    x = torch.rand(2, 3, 7, 4, dtype=torch.float64)
    found = focus(x, power)
    torch.testing.assert_close(
        vector_norm(found, dim=(1, 3)), vector_norm(x, dim=(1, 3)), atol=1e-12, rtol=0
    )
    # Ratios between channels, those of other heads too, are raised to the power.
    ratio = found / found[:, :1, :, :1]
    torch.testing.assert_close(ratio, (x / x[:, :1, :, :1]) ** power)
    assert (focus(torch.zeros_like(x), power) == 0).all()


def test_focused_linear_attention_focuses_what_no_power_could_hold() -> None:
    """Features of 1e-6, as where no channel is positive, to the eighth power are 0 in float32."""
    x = torch.full((1, 1, 2, 4), 1e-6)
    torch.testing.assert_close(focus(x, 8.0), x)


def test_focused_linear_attention_weights_sharpen_with_the_power() -> None:
    x = torch.randn(4, 25, 16).double()
    entropies = []
    for power in (1.0, 2.0, 3.0, 6.0):
        weights = _layer(power=power).weights(x)
        weights = weights / weights.sum(-1, keepdim=True)  # ε leaves a row without features below 1
        entropies.append(-torch.xlogy(weights, weights).sum(-1).mean().item())
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[0] - entropies[-1] > 0.1


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_focused_linear_attention_is_relu_linear_attention_without_its_parts(kv_heads: int) -> None:
    layer = _layer(power=1.0, kernel_size=None, eps=1e-13, kv_heads=kv_heads)
    torch.nn.init.zeros_(layer.channel_scale)
    x = torch.randn(2, 9, 16).double()
    q, k, v = (
        layer.split_heads(p(x)).repeat_interleave(2 // n, dim=1)
        for p, n in ((layer.q_proj, 2), (layer.k_proj, kv_heads), (layer.v_proj, kv_heads))
    )
    scores = q.relu() @ k.relu().mT
    weights = scores / scores.sum(-1, keepdim=True)
    assert weights.isfinite().all()
    torch.testing.assert_close(layer.weights(x), weights)
    inputs = layer.prepare(x)[-1]
    torch.testing.assert_close(layer(x), layer.output(weights @ v, inputs))


def test_focused_linear_attention_restores_the_rank_of_the_map() -> None:
    layer = _layer(heads=4)
    x = torch.randn(1, 25, 16).double()
    inputs = layer.prepare(x)[-1]
    weights = layer.weights(x)
    assert matrix_rank(weights).max() <= 4
    # One token told apart at a time, in all channels of all heads: rows of what the layer stands for.
    v = torch.eye(25).double()[:, None, :, None].expand(-1, 4, -1, 4)
    rows = layer.aggregate(weights.expand(25, -1, -1, -1), v, inputs)
    assert matrix_rank(rows.permute(1, 3, 2, 0)).min() == 25


@pytest.mark.parametrize("reduction", [1, 2])
def test_focused_linear_attention_forms_agree_with_places_and_reduced_keys(reduction: int) -> None:
    layer = _layer(grid=(4, 6), reduction=reduction)
    x = torch.randn(2, 24, 16).double()
    q, k, v, inputs = layer.prepare(x)
    weights = layer.weights(x)
    assert weights.shape == (2, 2, 24, 24 // reduction**2)
    staged = layer.output(layer.aggregate(layer.weigh(q, k, inputs), v, inputs), inputs)
    torch.testing.assert_close(layer(x), staged)
    before = layer(x)
    torch.nn.init.zeros_(layer.key_places)
    assert not torch.allclose(layer(x), before)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_focused_linear_attention_drops_weights_and_not_neighbours() -> None:
    layer = _layer(dropout=0.5).train()
    layer.o_proj.bias.data.zero_()
    x = torch.randn(1, 9, 16).double()
    *_, v, inputs = layer.prepare(x)
    torch.manual_seed(1)
    dropped = layer(x)
    torch.manual_seed(1)
    weights = torch.dropout(layer.weights(x), 0.5, True)
    near = layer.near(v, v)
    torch.testing.assert_close(dropped, Attention.output(layer, weights @ v + near, inputs))


def test_focused_linear_attention_begins_as_published() -> None:
    layer = attlas.make("focused-linear-attention", dim=64, heads=2, grid=(3, 3))
    assert (layer.key_places == 0).all()
    assert (layer.channel_scale == 0).all()
    assert layer.conv.weight.shape == (32, 1, 5, 5)
    assert layer.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert (layer.q_proj.bias == 0).all()


def test_focused_linear_attention_refuses_what_does_not_fit() -> None:
    for options, name in (
        ({"power": 0.5}, "power"), ({"eps": 0.0}, "eps"), ({"kernel_size": 4}, "kernel_size"),
        ({"reduction": 0}, "reduction"), ({"reduction": 2, "position": "rope"}, "position"),
        ({"grid": (3, 3), "reduction": 2}, "reduction"), ({"grid": (0, 3)}, "grid"),
        ({"grid": [2, 2, 2]}, "grid"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            attlas.make("focused-linear-attention", dim=16, heads=2, **options)
    x = torch.randn(1, 6, 16).double()
    with pytest.raises(ValueError, match="grid"):
        _layer(grid=(3, 3))(x)
    with pytest.raises(ValueError, match="reduction"):
        _layer(reduction=2)(x)
