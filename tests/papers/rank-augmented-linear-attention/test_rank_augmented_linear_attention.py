"""rank-augmented-linear-attention: keys are weighed, outputs gated, and features span more directions."""

from __future__ import annotations

import pytest
import torch
from torch.linalg import svdvals
from torch.nn.functional import elu

import attlas


def _layer(seed: int = 0, **options):
    torch.manual_seed(seed)
    layer = attlas.make("rala", **{"dim": 16, "heads": 2, **options}).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return layer


def _picture(height: int, width: int, channels: int) -> torch.Tensor:
    """Tokens of a smooth picture: neighbours are alike, as patches of photographs are."""
    rows = torch.linspace(0, 3, height).double()[:, None, None]
    columns = torch.linspace(0, 3, width).double()[None, :, None]
    waves = torch.linspace(0.2, 1.5, channels).double()
    return ((rows * waves).sin() + (columns * waves.flip(0)).cos()).reshape(
        1, height * width, channels
    )


def _rank(features: torch.Tensor) -> int:
    """Singular values above a thousandth of the largest."""
    values = svdvals(features)
    return int((values > 1e-3 * values[0]).sum())


@pytest.mark.parametrize("seed", range(4))
def test_rank_augmented_linear_attention_spans_more_directions(seed: int) -> None:
    """Of a picture's tokens, with the same queries, keys and values, and no convolution to help."""
    layer = _layer(seed, rotary=False, kernel_size=None, dim=32, heads=4)
    plain = attlas.make("linear-attention", dim=32, heads=4, bias=True).double()
    plain.load_from(layer.state_dict())
    x = _picture(10, 10, 32)
    with torch.no_grad():
        ours, theirs = _rank(layer(x)[0]), _rank(plain(x)[0])
    assert ours > theirs, (ours, theirs)


def test_rank_augmented_linear_attention_weighs_keys_by_the_mean_query() -> None:
    layer = _layer(rotary=False, eps=1e-13)
    x = torch.randn(2, 12, 16).double()
    q, k, *_ = layer.prepare(x)
    q, k = elu(q) + 1, elu(k) + 1
    alpha = 12 * (q.mean(2, keepdim=True) @ k.mT / 8**0.5).softmax(-1)
    scores = (q @ k.mT) * alpha
    torch.testing.assert_close(layer.weights(x), scores / scores.sum(-1, keepdim=True))
    torch.testing.assert_close(layer.alpha(q, k).mean(2), torch.ones(2, 2, 1).double())


def test_rank_augmented_linear_attention_of_grouped_keys_weighs_them_for_every_query_head() -> None:
    layer = _layer(heads=4, kv_heads=2, dim=16, grid=(3, 3))
    full = _layer(heads=4, dim=16, grid=(3, 3))
    state = dict(layer.state_dict())
    for name in ("k_proj", "v_proj", "conv"):
        for part in ("weight", "bias"):
            each = state[f"{name}.{part}"].unflatten(0, (2, 4))
            state[f"{name}.{part}"] = each.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    x = torch.randn(2, 9, 16).double()
    torch.testing.assert_close(layer(x), full(x))


def test_rank_augmented_linear_attention_gate_is_linear() -> None:
    layer = _layer()
    x = torch.randn(1, 9, 16).double()
    torch.nn.init.zeros_(layer.o_proj.bias)
    before = layer(x)
    with torch.no_grad():
        layer.gate_proj.weight *= -3
        layer.gate_proj.bias *= -3
    torch.testing.assert_close(layer(x), -3 * before)
