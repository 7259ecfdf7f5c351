"""qk-norm: logits are cosines times g, whatever the size of queries and keys."""

from __future__ import annotations

import math

import pytest
import torch

import attlas


def _layer(**options):
    return attlas.make("qk-norm", dim=32, heads=4, **options).double()


def test_qk_norm_logits_are_bounded_by_g() -> None:
    layer = _layer()
    x = 1e4 * torch.randn(2, 11, 32, dtype=torch.float64)
    q, k, _, inputs = layer.prepare(x)
    assert layer.score(q, k, inputs).abs().max() <= layer.g.abs() * (1 + 1e-12)


def test_qk_norm_does_not_feel_the_size_of_queries_or_keys() -> None:
    layer = _layer(causal=True)
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    q, k, v, inputs = layer.prepare(x)
    rescaled = layer.attend(1e3 * q, 1e-3 * k, v, inputs)
    torch.testing.assert_close(rescaled, layer.attend(q, k, v, inputs), atol=1e-6, rtol=0)


def test_qk_norm_starts_at_log2_of_the_pairs() -> None:
    assert _layer(length=12).g.item() == pytest.approx(math.log2(12 * 12 - 12))


def test_qk_norm_is_a_mean_at_g_0() -> None:
    layer = _layer()
    torch.nn.init.zeros_(layer.g)
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    weights = layer.weights(x)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 11))


def test_qk_norm_refuses_a_length_without_pairs() -> None:
    with pytest.raises(ValueError, match="length must be at least 2"):
        _layer(length=1)
