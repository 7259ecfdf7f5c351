"""fastmax: the moments of keys give what the polynomial of all pairs gives."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attlas

ORDERS = [(1.0, 1.0), (1.0, 1.0, 0.5), (0.7, 0.0, 0.3), (1.0,)]


def _layer(**options):
    torch.manual_seed(0)
    return attlas.make("fastmax", **{"dim": 16, "heads": 2, **options}).double().eval()


def _standardised(x):
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, unbiased=False)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("coefficients", ORDERS)
def test_fastmax_factored_is_the_polynomial_of_all_pairs(coefficients, causal: bool) -> None:
    layer = _layer(coefficients=coefficients, causal=causal, norm=False)
    x = torch.randn(2, 70, 16).double()
    q, k, v, inputs = layer.prepare(x)
    s = q @ k.mT
    f = sum(a * s**power for power, a in enumerate(coefficients)) + 0 * s
    f = f.tril() if causal else f
    weights = f / f.sum(-1, keepdim=True)
    torch.testing.assert_close(layer.weights(x), weights)
    torch.testing.assert_close(layer.attend(q, k, v, inputs), weights @ v)


def test_fastmax_standardises_every_query_and_key() -> None:
    layer, x = _layer(norm_eps=1e-12), torch.randn(1, 9, 16).double()
    q, k, *_ = layer.prepare(x)
    s = _standardised(q) @ _standardised(k).mT
    f = 1 + s + s**2 / 2
    torch.testing.assert_close(layer.weights(x), f / f.sum(-1, keepdim=True))
    # So neither their size nor what all channels share matters.
    with torch.no_grad():
        before = layer(x)
        layer.q_proj.weight *= 7
        layer.k_proj.weight += torch.randn(2, 1, 16).double().expand(2, 8, 16).flatten(0, 1)
    torch.testing.assert_close(layer(x), before)


def test_fastmax_weights_of_second_order_are_positive() -> None:
    """f(s) = ((1 + s)² + 1) / 2; of first order they are not where s < −1."""
    layer, x = _layer(), torch.randn(2, 20, 16).double()
    weights = layer.weights(x)
    assert bool((weights > 0).all())
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 20).double())
    first = _layer(coefficients=(1.0, 1.0)).weights(x)
    assert bool((first < 0).any())


def test_fastmax_of_faint_scores_is_softmax_up_to_the_third_power() -> None:
    layer = _layer(norm=False)
    plain = attlas.make("softmax", dim=16, heads=2).double()
    plain.load_state_dict(layer.state_dict())
    plain.scale = 1.0
    x, apart = torch.randn(1, 12, 16).double(), []
    for size in (0.2, 0.1):
        with torch.no_grad():
            apart.append(float((layer.weights(size * x) - plain.weights(size * x)).abs().max()))
    # Scores go with the square of the size, what the polynomial leaves out with their third power.
    assert 0 < apart[1] < apart[0] / 2**5.5


def test_fastmax_without_scores_gives_means() -> None:
    layer, x = _layer(coefficients=(2.0,), causal=True), torch.randn(1, 9, 16).double()
    _, _, v, inputs = layer.prepare(x)
    means = v.cumsum(2) / torch.arange(1, 10).double()[:, None]
    torch.testing.assert_close(layer(x), layer.output(means, inputs))


def test_fastmax_keeps_moments_of_keys_and_no_keys() -> None:
    layer, x = _layer(causal=True, norm=False), torch.randn(1, 6, 16).double()
    cache = layer.init_cache()
    layer(x, cache=cache)
    _, k, v, *_ = layer.prepare(x)
    state = cache.layers[0].states["state"]
    assert list(state.shape) == [1, 2, 1 + 8 + 36, 9]
    torch.testing.assert_close(state[:, :, 0, :8], v.sum(2))
    torch.testing.assert_close(state[:, :, 1:9, :8], k.mT @ v)
    torch.testing.assert_close(state[:, :, 1:9, 8], k.sum(2))


@pytest.mark.parametrize("causal", [False, True])
def test_fastmax_doubles_its_work_when_n_doubles(causal: bool) -> None:
    layer, work = attlas.make("fastmax", dim=16, heads=2, causal=causal), []
    for tokens in (256, 512):
        with FlopCounterMode(display=False) as count:
            layer(torch.randn(1, tokens, 16))
        work.append(count.get_total_flops())
    assert work[1] == 2 * work[0]


@pytest.mark.parametrize("wrong", [(), (1.0, 1.0, 0.5, 0.1), (1.0, -1.0), (0.0, 0.0)])
def test_fastmax_refuses_coefficients_without_features(wrong) -> None:
    with pytest.raises(ValueError, match="coefficients"):
        _layer(coefficients=wrong)


def test_fastmax_refuses_a_norm_that_divides_by_zero() -> None:
    with pytest.raises(ValueError, match="norm_eps"):
        _layer(norm_eps=0.0)
