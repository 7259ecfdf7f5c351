"""softmax-as-rnn: softmax attention as a growing sum of recurrences."""

from __future__ import annotations

from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

import attlas
from attlas.layers.linear.softmax_rnn import powers

NAME = "softmax-as-rnn"


@settings(max_examples=20, deadline=None)
@given(width=st.integers(1, 5), order=st.integers(0, 6), seed=st.integers(0, 100))
def test_features_multiply_to_the_series_of_the_exponential(
    width: int, order: int, seed: int
) -> None:
    torch.manual_seed(seed)
    x, y = torch.randn(2, 4, width).double()
    products = x @ y.mT
    series = sum(products**n / torch.arange(1, n + 1).prod() for n in range(order + 1))
    torch.testing.assert_close(powers(x, order) @ powers(y, order).mT, torch.as_tensor(series))
    assert powers(x, order).shape[-1] == comb(width + order, order)


def test_orders_converge_to_softmax_attention() -> None:
    exact = attlas.make(NAME, dim=8, heads=2, order=None, causal=True).double()
    x = torch.randn(1, 20, 8).double()
    with torch.no_grad():  # scores up to 1.5
        scores = exact.prepare(x)
        size = (scores[0] @ scores[1].mT / 2).abs().max()
        for projection in (exact.q_proj, exact.k_proj):
            projection.weight *= (1.5 / size) ** 0.5
    errors = []
    for order in (2, 4, 6, 8):
        layer = attlas.make(NAME, dim=8, heads=2, order=order, causal=True).double()
        layer.load_state_dict(exact.state_dict())
        errors.append((layer(x) - exact(x)).abs().max().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


@pytest.mark.parametrize("options", [
    {"order": 2}, {"order": 3, "divisor": "length"}, {"order": 0}, {"kernel": "elu"},
    {"kernel": "relu", "divisor": "length"}, {"order": 4, "divisor": "none", "gate": True},
    {"order": 2, "divisor": "length", "norm": True},
])  # fmt: skip
def test_recurrences_give_what_all_pairs_give_and_decode_with_a_constant_state(
    options: dict[str, object],
) -> None:
    layer = attlas.make(NAME, dim=8, heads=2, causal=True, **options).double()
    x = torch.randn(2, 9, 8).double()
    q, k, v, inputs = layer.prepare(x)
    direct = layer.output(layer.weigh(q, k, inputs) @ v, inputs)
    torch.testing.assert_close(layer(x), direct)
    cache = layer.init_cache()
    steps = [layer(part, cache=cache) for part in x.split([4, 1, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), direct)
    assert set(cache.layers[0].states) == {"state"}


def test_the_recurrence_takes_over_where_pairs_are_more() -> None:
    layer = attlas.make(NAME, dim=8, heads=2, causal=True, order=2).double()
    assert layer.monomials == 15
    x = torch.randn(2, 40, 8).double()
    q, k, v, inputs = layer.prepare(x)
    direct = layer.output(layer.weigh(q, k, inputs) @ v, inputs)
    torch.testing.assert_close(layer(x), direct)
    torch.testing.assert_close(layer(x[:, :30]), direct[:, :30])


def test_autocast_does_not_round_the_powers() -> None:
    """Rounded to bfloat16, the powers of scores near -10 no longer cancel: errors of 8 %."""
    torch.manual_seed(0)
    layer = attlas.make(NAME, dim=64, heads=4, order=4, causal=True)
    with torch.no_grad():
        layer.q_proj.weight *= 3
        layer.k_proj.weight *= 3
        x = torch.randn(2, 64, 64)
        exact = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            error = (layer(x) - exact).abs().max() / exact.abs().max()
    assert error < 0.02


@pytest.mark.parametrize("divisor", ["sum", "length", "none"])
def test_all_powers_decode_with_keys_in_the_cache(divisor: str) -> None:
    layer = attlas.make(NAME, dim=8, heads=2, causal=True, order=None, divisor=divisor, clamp=5.0)
    layer = layer.double()
    x = torch.randn(2, 9, 8).double()
    cache = layer.init_cache()
    steps = [layer(part, cache=cache) for part in x.split([4, 1, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), layer(x))
    assert cache.layers[0].keys.shape[2] == 9


def test_length_divides_by_the_real_keys_that_a_query_sees() -> None:
    layer = attlas.make(NAME, dim=8, heads=2, order=0, divisor="length", causal=True).double()
    weights = layer.weights(torch.randn(1, 6, 8).double())
    means = torch.ones(6, 6).tril() / torch.arange(1, 7)[:, None]
    torch.testing.assert_close(weights, means.double().expand_as(weights))
    valid = torch.tensor([[False, False, True, True, True, True]])
    padded = layer.weights(torch.randn(1, 6, 8).double(), mask=valid)
    torch.testing.assert_close(padded.sum(-1)[0, 0, 2:], torch.ones(4).double())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"order": -2}, "order"), ({"order": 3}, "order"), ({"kernel": "tanh"}, "kernel"),
        ({"divisor": "max"}, "divisor"), ({"order": 2, "clamp": 5.0}, "clamp"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises((ValueError, TypeCheckError), match=named):
        attlas.make(NAME, dim=8, heads=2, **options)
