"""diff-mamba: two selective state spaces and what is left of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import rms_norm, silu, softplus

import attlas


def _made(**options: object) -> torch.nn.Module:
    return attlas.make("diff-mamba", **{"dim": 16, "heads": 4, "state": 6, **options}).double()


def _mixer(layer: torch.nn.Module, x: torch.Tensor, which: int) -> torch.Tensor:
    """One mixer token by token, from the equations."""
    heads, width, size, groups = layer.heads, layer.head_dim, layer.state, layer.groups
    inner = heads * width
    raw = layer.in_proj(x).chunk(2, dim=-1)[which]
    weight, bias = (p.chunk(2)[which] for p in (layer.conv.weight[:, 0], layer.conv.bias))
    padded = torch.cat((torch.zeros_like(raw[:, :3]), raw), dim=1)
    mixed = silu(sum(padded[:, i : i + raw.shape[1]] * weight[:, i] for i in range(4)) + bias)
    u, b, c = mixed.split([inner, groups * size, groups * size], dim=-1)
    step = softplus(layer.step_proj(x) + layer.step_bias).chunk(2, dim=-1)[which]
    rate, skip = (-layer.rate.exp()).chunk(2)[which], layer.skip.chunk(2)[which]
    outs = []
    for h in range(heads):
        group = slice(h // (heads // groups) * size, (h // (heads // groups) + 1) * size)
        state, own = torch.zeros(len(x), size, width).double(), u[..., h * width : (h + 1) * width]
        rows = []
        for t in range(x.shape[1]):
            written = step[:, t, h, None, None] * b[:, t, group, None] * own[:, t, None]
            state = (step[:, t, h] * rate[h]).exp()[:, None, None] * state + written
            rows.append((c[:, t, None, group] @ state)[:, 0] + skip[h] * own[:, t])
        outs.append(torch.stack(rows, dim=1))
    gate = silu(layer.gate_proj(x)).chunk(2, dim=-1)[which]
    gated = rms_norm(torch.cat(outs, dim=-1) * gate, (inner,), layer.norms[which].weight, 1e-5)
    return layer.o_proj[which](gated)


@pytest.mark.parametrize("groups", [1, 2])
def test_layer_is_the_normalised_difference_of_two_mixers(groups: int) -> None:
    layer = _made(groups=groups, layer_idx=3)
    x = torch.randn(2, 7, 16).double()
    share = layer.lambda_q.sum().sigmoid() + layer.lambda_init
    left = _mixer(layer, x, 0) - share * _mixer(layer, x, 1)
    expected = rms_norm(left, (16,), layer.sub_norm.weight, 1e-5) * (1 - layer.lambda_init)
    torch.testing.assert_close(layer(x), expected)


def test_without_the_second_mixer_it_is_a_normalised_mamba_mixer() -> None:
    layer = _made()
    x = torch.randn(2, 7, 16).double()
    with torch.no_grad():
        layer.lambda_q.fill_(-1e3)
    layer.lambda_init = 0.0
    torch.testing.assert_close(layer(x), rms_norm(_mixer(layer, x, 0), (16,), None, 1e-5))


def test_lambda_grows_with_the_depth_as_in_the_differential_transformer() -> None:
    found = [_made(layer_idx=i).lambda_init for i in (0, 1, 30)]
    assert found == pytest.approx([0.2, 0.8 - 0.6 * math.exp(-0.3), 0.8], abs=1e-3)


def test_lambda_begins_normal_with_spread_one() -> None:
    drawn = torch.cat([_made(dim=256, heads=2).lambda_q.detach() for _ in range(8)])
    assert drawn.mean().abs() < 0.1
    assert 0.93 < drawn.std() < 1.07


def test_steps_begin_between_a_thousandth_and_a_tenth() -> None:
    layer = _made(heads=16)
    steps = softplus(layer.step_bias)
    assert 1e-3 <= steps.min() < steps.max() <= 0.1


def test_limits_hold_steps_of_any_input() -> None:
    layer = _made(step_limits=(0.01, 0.05))
    inputs = layer.prepare(1e3 * torch.randn(1, 9, 16).double())[-1]
    steps = layer.steps(inputs)
    assert 0.01 <= steps.min() < steps.max() <= 0.05


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"groups": 3}, "groups"), ({"kv_heads": 2}, "kv_heads"), ({"state": 0}, "state"),
        ({"kernel_size": 0}, "kernel_size"), ({"step_limits": (0.2, 0.1)}, "step_limits"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        _made(**options)
