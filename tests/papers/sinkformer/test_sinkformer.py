"""sinkformer: one half step is softmax, many make the map doubly stochastic."""

from __future__ import annotations

import pytest
import torch

import attlas
from attlas import Attention


def _layer(**options):
    return attlas.make("sinkformer", dim=32, heads=4, **options).double()


def test_sinkformer_of_one_half_step_is_softmax() -> None:
    layer, plain = _layer(half_steps=1), Attention(32, 4).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-6, rtol=0)


def test_sinkformer_rows_and_columns_approach_one() -> None:
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    off = []
    for half_steps in (1, 5, 20, 40):
        torch.manual_seed(0)
        weights = _layer(half_steps=half_steps).weights(x)
        off.append(max(float((weights.sum(d) - 1).abs().max().detach()) for d in (-1, -2)))
    assert off == sorted(off, reverse=True)
    assert off[2] < 1e-3
    torch.testing.assert_close(weights.sum(-2), torch.ones_like(weights.sum(-2)), atol=1e-9, rtol=0)


def test_sinkformer_gives_padding_no_part_on_either_side() -> None:
    layer = _layer(half_steps=9)
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    valid = torch.tensor([[True] * 6 + [False] * 3])
    weights = layer.weights(x, mask=valid)
    assert (weights[..., 6:] == 0).all()
    torch.testing.assert_close(weights[:, :, :6, :6], layer.weights(x[:, :6]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"half_steps": 0}, "half_steps must be at least 1"),
        ({"epsilon": 0.0}, "epsilon must be above 0"),
        ({"causal": True}, "Sinkformer has no causal form"),
    ],
)
def test_sinkformer_refuses_what_it_cannot(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _layer(**options)
