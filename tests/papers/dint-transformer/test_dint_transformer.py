"""dint-transformer: rows sum to 1 for any λ, λ = 0 is softmax attention, and the past stays put."""

from __future__ import annotations

import math

import pytest
import torch

import attlas
from attlas import masks


def _layer(**options):
    return attlas.make("dint-transformer", **{"dim": 32, "heads": 2, **options}).double()


def _set_lambda(layer, value: float) -> None:
    """λ = exp(0) − exp(λq₂·λk₂) + λ_init = value."""
    with torch.no_grad():
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            getattr(layer, name).zero_()
        # exp(·) is positive: a λ above 1 + λ_init comes from the first pair.
        over = value - layer.lambda_init
        pair = ("lambda_q1", "lambda_k1") if over > 0 else ("lambda_q2", "lambda_k2")
        getattr(layer, pair[0])[0] = math.log(1 + abs(over))
        getattr(layer, pair[1])[0] = 1.0
    assert layer.lambda_.item() == pytest.approx(value, abs=1e-12)


PATTERNS = {
    "none": None,
    "causal": masks.causal,
    "window": masks.window(3),
    "causal window": masks.causal & masks.window(4),
    "sinks": masks.causal & (masks.window(3) | masks.sinks(2)),
}


@pytest.mark.parametrize("value", [-0.7, 0.0, 0.2, 1.0, 3.0])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_dint_transformer_rows_sum_to_one_for_any_lambda(pattern: str, value: float) -> None:
    layer = _layer(mask=PATTERNS[pattern])
    _set_lambda(layer, value)
    weights = layer.weights(torch.randn(2, 11, 32, dtype=torch.float64))
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 11).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_dint_transformer_without_lambda_is_softmax(causal: bool) -> None:
    layer = _layer(causal=causal)
    _set_lambda(layer, 0.0)
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    q, k, _, inputs = layer.prepare(x)
    q, k = layer.maps(q, k, inputs)[0]
    scores = q @ k.mT * layer.head_dim**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones(11, 11).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(layer.weights(x), scores.softmax(-1), atol=1e-6, rtol=0)


def test_dint_transformer_never_looks_ahead() -> None:
    layer = _layer(causal=True)
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    changed = x.clone()
    changed[:, 7:] = 10 * torch.randn_like(x[:, 7:])
    assert torch.equal(layer(x)[:, :7], layer(changed)[:, :7])
    assert not torch.allclose(layer(x)[:, 7:], layer(changed)[:, 7:])


@pytest.mark.parametrize("causal", [False, True])
def test_dint_transformer_integral_is_the_mean_of_the_first_map(causal: bool) -> None:
    """From the definition: column means of A₁ over all queries, or over those up to each."""
    layer = _layer(causal=causal)
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    q, k, v, inputs = layer.prepare(x)
    scores = torch.stack([q @ k.mT * layer.head_dim**-0.5 for q, k in layer.maps(q, k, inputs)])
    if causal:
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    first, second = scores.softmax(-1)
    mean = torch.stack([first[:, :, : i + 1 if causal else 6].mean(2) for i in range(6)], dim=2)
    wanted = first - layer.lambda_ * second + layer.lambda_ * mean
    torch.testing.assert_close(layer.weights(x), wanted)
    torch.testing.assert_close(layer.attend(q, k, v, inputs), wanted @ v)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_dint_transformer_gives_no_weight_to_hidden_keys(pattern: str) -> None:
    layer = _layer(mask=PATTERNS[pattern])
    weights = layer.weights(torch.randn(1, 9, 32, dtype=torch.float64))
    if PATTERNS[pattern] is not None:
        assert (weights[~masks.dense(PATTERNS[pattern], 9, 9).expand_as(weights)] == 0).all()


def test_dint_transformer_padded_queries_do_not_count() -> None:
    layer = _layer()
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    valid = torch.tensor([[False] * 3 + [True] * 6])
    torch.testing.assert_close(layer(x, mask=valid)[:, 3:], layer(x[:, 3:]))


def test_dint_transformer_takes_a_mask_for_each_head() -> None:
    pattern = masks.per_head(masks.causal, masks.window(3))
    layer = _layer(mask=pattern, position="alibi")
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    weights = layer.weights(x)
    assert (weights[~masks.dense(pattern, 9, 9)] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 9).double())


def test_dint_transformer_refuses_to_decode_under_other_masks() -> None:
    layer = _layer(causal=True, mask=masks.window(3))
    with pytest.raises(ValueError, match="mask: with a cache"):
        layer(torch.randn(1, 5, 32).double(), cache=layer.init_cache())
