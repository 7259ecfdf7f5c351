"""gated-linear-attention: gates that open and forget."""

from __future__ import annotations

import math

import pytest
import torch

import attlas


def test_gated_linear_attention_with_open_gates_forgets_nothing() -> None:
    layer = attlas.make("gated-linear-attention", dim=16, heads=2).double()
    with torch.no_grad():
        layer.decay_proj[1].weight.zero_()
        layer.decay_proj[1].bias.fill_(1e4)
    q, k, _, inputs = layer.prepare(torch.randn(1, 9, 16).double())
    weights = layer.weigh(q, k, inputs)
    torch.testing.assert_close(weights, (q @ k.mT).tril() / math.sqrt(layer.key_dim))


def test_gated_linear_attention_with_shut_gates_sees_the_token_itself_alone() -> None:
    layer = attlas.make("gated-linear-attention", dim=16, heads=2).double()
    with torch.no_grad():
        layer.decay_proj[1].bias.fill_(-1e6)
    weights = layer.weights(torch.randn(1, 9, 16).double())
    assert not (weights * ~torch.eye(9, dtype=torch.bool)).any()
    assert weights.diagonal(dim1=-2, dim2=-1).any()


def test_gated_linear_attention_has_half_as_wide_keys_and_gates_close_to_one() -> None:
    layer = attlas.make("gated-linear-attention", dim=32, heads=2, kv_heads=1)
    assert layer.k_proj.out_features == 8
    _, k, *_, inputs = layer.prepare(torch.randn(2, 9, 32))
    decay = layer.gates(k, inputs)["log_decay"].exp()
    assert decay.shape == (2, 1, 9, 8)
    assert 0.9 < decay.min() <= decay.max() < 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"key_dim": 0}, "key_dim"),
        ({"gate_rank": 0}, "gate_rank"),
        ({"gate_temper": 0.0}, "gate_temper"),
    ],
)
def test_wrong_options_are_named(options: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        attlas.make("gated-linear-attention", dim=16, heads=2, **options)
