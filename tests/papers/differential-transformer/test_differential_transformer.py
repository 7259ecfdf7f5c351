"""differential-transformer: rows sum to 1 − λ; without λ it is softmax attention."""

from __future__ import annotations

import math

import pytest
import torch

import attlas


def _layer(**options):
    made = attlas.make("differential-transformer", **{"dim": 32, "heads": 2, **options})
    return made.double()


def _without_lambda(layer) -> None:
    """λ = exp(0) − exp(λq₂·λk₂) + λ_init = 0."""
    with torch.no_grad():
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            getattr(layer, name).zero_()
        layer.lambda_q2[0] = math.log(1 + layer.lambda_init)
        layer.lambda_k2[0] = 1.0


def test_differential_transformer_rows_sum_to_one_less_lambda() -> None:
    layer = _layer(causal=True, depth=3)
    weights = layer.weights(torch.randn(2, 11, 32, dtype=torch.float64))
    wanted = (1 - layer.lambda_).detach().expand(2, 2, 11)
    torch.testing.assert_close(weights.sum(-1).detach(), wanted)


def test_differential_transformer_without_lambda_is_softmax() -> None:
    layer = _layer(causal=True)
    _without_lambda(layer)
    assert abs(layer.lambda_.item()) < 1e-12
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    q, k, _, inputs = layer.prepare(x)
    q, k = layer.maps(q, k, inputs)[0]
    scores = q @ k.mT * layer.head_dim**-0.5
    hidden = torch.ones(11, 11, dtype=torch.bool).triu(1)
    plain = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    torch.testing.assert_close(layer.weights(x), plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("depth", "wanted"), [(0, 0.2), (3, 0.8 - 0.6 * math.exp(-0.9))])
def test_differential_transformer_lambda_starts_by_depth(depth: int, wanted: float) -> None:
    assert _layer(depth=depth).lambda_init == pytest.approx(wanted)
    assert _layer(layer_idx=depth).lambda_init == pytest.approx(wanted)


def test_differential_transformer_pairs_of_keys() -> None:
    layer = _layer(heads=4, kv_heads=2)
    inputs = layer.prepare(torch.randn(1, 1, 32).double())[-1]
    q, k = torch.zeros(1, 8, 1, 1), torch.arange(4.0).view(1, 4, 1, 1)
    (_, first), (_, second) = layer.maps(
        q, k, inputs
    )  # one key head for the two query heads of a group
    assert (first.flatten().tolist(), second.flatten().tolist()) == ([0, 2], [1, 3])
    repeated = _layer(heads=4, kv_heads=2, pairing="repeated")
    (_, first), (_, second) = repeated.maps(q, k, inputs)
    assert first.flatten().tolist() == second.flatten().tolist() == [0, 1, 2, 3]
    with pytest.raises((ValueError, TypeError), match="pairing"):
        _layer(pairing="other")


@pytest.mark.parametrize("position", ["alibi", "rope"])
def test_differential_transformer_gives_both_maps_of_a_head_the_same_mask(position: str) -> None:
    from attlas import masks

    layer = _layer(position=position, mask=masks.per_head(masks.causal, masks.window(3)))
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    weights = layer.weights(x)
    assert (weights[0, 0].triu(1) == 0).all()
    far = masks.dense(~masks.window(3), 9, 9)[0, 0]
    assert (weights[0, 1][far] == 0).all()
    *_, v, inputs = layer.prepare(x)
    torch.testing.assert_close(layer(x), layer.output(layer.aggregate(weights, v, inputs), inputs))
