"""linear-log-normal-attention: as concentrated as a softmax, at any temperature."""

from __future__ import annotations

import math

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

import attlas
from attlas.layers.linear.log_normal import matched

NAME = "linear-log-normal-attention"


# How concentrated weights are, as the paper measures it -------------------------------------------


def entropy(weights: Float[Tensor, "*rows keys"]) -> Float[Tensor, "*rows"]:
    """Entropy of every query's weights, in nats."""
    found: Tensor = torch.special.entr(weights).sum(-1)
    return found


def log_variance(weights: Float[Tensor, "*rows keys"]) -> Float[Tensor, "*rows"]:
    """Variance of the logarithms of every query's positive weights."""
    logs = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
    shown = weights > 0
    count = shown.sum(-1)
    mean = torch.where(shown, logs, 0.0).sum(-1) / count
    return torch.where(shown, logs - mean[..., None], 0.0).square().sum(-1) / (count - 1)


def log_normality(weights: Float[Tensor, "*rows keys"]) -> float:
    """Kolmogorov's distance between the standardised logarithms of all weights and a normal law."""
    logs = weights[weights > 0].log().sort().values
    normal = torch.special.ndtr((logs - logs.mean()) / logs.std())
    steps = torch.arange(len(logs) + 1, device=logs.device) / len(logs)
    return float(torch.maximum((normal - steps[1:]).abs(), (normal - steps[:-1]).abs()).max())


def spectral_gap(weights: Float[Tensor, "*rows tokens tokens"]) -> Float[Tensor, "*rows"]:
    """1 − |λ₂| of a matrix of weights, whose largest eigenvalue is 1."""
    sizes = torch.linalg.eigvals(weights).abs().sort(-1, descending=True).values
    gap: Tensor = 1.0 - sizes[..., 1]
    return gap


def _weights(q: torch.Tensor, k: torch.Tensor, kind: str) -> torch.Tensor:
    """Weights of Gaussian queries and keys: of a softmax, of matched features, of elu features."""
    if kind == "softmax":
        return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    if kind == "lln":
        layer = attlas.make(NAME, dim=q.shape[-1], heads=1, blocks=False, eps=0.0).double().eval()
        layer.calibrate(q, k)
    else:
        layer = attlas.make("linear-attention", dim=q.shape[-1], heads=1).double()
    inputs = layer.prepare(torch.zeros(1, q.shape[2], q.shape[-1]).double())[-1]
    return layer.weigh(q, k, inputs)


@pytest.mark.parametrize("temperature", [1.2, 1.4, 1.6, 1.8])
def test_log_variance_follows_softmax_where_elu_features_do_not(temperature: float) -> None:
    q, k = (temperature * torch.randn(1, 1, 1000, 64).double() for _ in range(2))
    found = {
        kind: log_variance(_weights(q, k, kind)).mean().item() for kind in ("softmax", "lln", "elu")
    }
    assert abs(found["softmax"] / temperature**4 - 1) < 0.1  # σ_q² σ_k²
    assert abs(found["lln"] / found["softmax"] - 1) < 0.15
    assert abs(found["elu"] / found["softmax"] - 1) > 0.5


def test_matched_features_share_their_spread_between_queries_and_keys() -> None:
    alpha, beta = matched(torch.tensor(2.0), torch.tensor(0.5))
    torch.testing.assert_close(2.0 * alpha, 0.5 * beta)
    assert matched(torch.tensor(2.0), torch.tensor(2.0))[0] * 2 > 2.0 * alpha  # sharper


def test_blocks_are_softmax_attention_to_neighbours_alone() -> None:
    layer = attlas.make(NAME, dim=8, heads=2, causal=True).double().eval()
    x = torch.randn(1, 11, 8).double()
    q, k, v, inputs = layer.prepare(x)
    found = layer.diagonal(q, k, v, inputs)
    at = torch.arange(11) // 4
    hidden = (at[:, None] != at) | torch.ones(11, 11, dtype=torch.bool).triu(1)
    expected = (q @ k.mT / 2).masked_fill(hidden, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(found, expected)
    assert inputs.pairs is layer.pattern


def test_training_moves_the_running_deviations_and_answers_do_not_rest_on_other_sequences() -> None:
    layer = attlas.make(NAME, dim=16, heads=2, causal=True, momentum=0.5)
    x = 5 * torch.randn(8, 30, 16)
    q, k, *_ = layer.prepare(x)
    torch.testing.assert_close(layer.q_std, (1 + q.std()) / 2)
    torch.testing.assert_close(layer.k_std, (1 + k.std()) / 2)
    layer.eval()
    torch.testing.assert_close(layer(x[:1]), layer(x)[:1])
    assert {"q_std", "k_std"} <= set(layer.state_dict())


def test_one_large_key_far_behind_brings_no_earlier_sum_to_zero() -> None:
    layer = attlas.make(NAME, dim=8, heads=1, causal=True, blocks=False, eps=0.0).eval()
    q, k, v, inputs = layer.prepare(torch.randn(1, 6, 8))
    k[:, :, 5] = 500.0
    weights = layer.weigh(q, k, inputs)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    torch.testing.assert_close(layer.attend(q, k, v, inputs), weights @ v)


def test_meters_know_the_extremes() -> None:
    even = torch.full((4, 4), 0.25).double()
    torch.testing.assert_close(entropy(even), torch.full((4,), math.log(4)).double())
    torch.testing.assert_close(spectral_gap(even), torch.tensor(1.0).double())
    torch.testing.assert_close(spectral_gap(torch.eye(4).double()), torch.tensor(0.0).double())
    torch.testing.assert_close(entropy(torch.eye(4).double()), torch.zeros(4).double())
    normal = torch.randn(100, 100).double()
    assert log_normality(normal.exp()) < 0.02
    assert log_normality(normal.sinh().exp()) > 0.05
    torch.testing.assert_close(log_variance(normal.exp()), normal.var(-1))


@pytest.mark.parametrize(
    ("options", "named"), [({"momentum": 2.0}, "momentum"), ({"eps": -1.0}, "eps")]
)
def test_wrong_options_are_named(options: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        attlas.make(NAME, dim=16, heads=2, **options)


@pytest.mark.parametrize("mix", ["ratio", "scale"])
def test_trained_shares_are_those_of_the_mean_at_first_and_have_no_map(mix: str) -> None:
    torch.manual_seed(0)
    plain = attlas.make(NAME, dim=16, heads=2, causal=True).double().eval()
    layer = attlas.make(NAME, dim=16, heads=2, causal=True, mix=mix).double().eval()
    layer.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 21, 16).double()
    torch.testing.assert_close(layer(x), plain(x))
    with torch.no_grad():
        for name, share in layer.named_parameters():
            if name.endswith("share"):
                share.uniform_(0.2, 1.2)
    cache, whole = layer.init_cache(), layer(x)
    steps = [layer(part, cache=cache) for part in x.split([9, 1, 11], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)
    assert not torch.allclose(whole, plain(x))
    with pytest.raises(ValueError, match=f"mix='{mix}'"):
        layer.weights(x)
    for options in ({"dropout": 0.1}, {"blocks": False}):
        with pytest.raises(ValueError, match=f"mix='{mix}' .* blocks=True and dropout=0"):
            attlas.make(NAME, dim=16, heads=2, mix=mix, **options)


def test_dropout_falls_on_both_parts_alike() -> None:
    layer = attlas.make(NAME, dim=16, heads=2, causal=True, dropout=0.5).double().train()
    x = torch.randn(1, 12, 16).double()
    q, k, v, inputs = layer.prepare(x)
    torch.manual_seed(1)
    found = layer.attend(q, k, v, inputs)
    torch.manual_seed(1)
    torch.testing.assert_close(found, layer.aggregate(layer.weigh(q, k, inputs), v, inputs))
