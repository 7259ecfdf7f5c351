"""regla: refined gates that keep their gradient, and exponentials of unit variance."""

from __future__ import annotations

import math

import pytest
import torch

import attlas
from attlas.layers.linear.regla import refined, variance_scale


def test_refining_at_one_half_leaves_a_gate_as_it_is() -> None:
    gate = torch.linspace(-30, 30, 61).double()
    torch.testing.assert_close(refined(gate, torch.zeros_like(gate)).exp(), gate.sigmoid())


@pytest.mark.parametrize(("refine", "toward"), [(-50.0, 1), (50.0, 2)])
def test_refining_reaches_both_bounds(refine: float, toward: int) -> None:
    gate = torch.linspace(-5, 5, 11).double()
    g = gate.sigmoid()
    bound = g**2 if toward == 1 else 1 - (1 - g) ** 2
    torch.testing.assert_close(refined(gate, torch.full_like(gate, refine)).exp(), bound)


def test_a_saturated_gate_keeps_more_gradient_when_refined() -> None:
    gate = torch.tensor(math.log(0.99 / 0.01)).double().requires_grad_()
    plain = torch.autograd.grad(gate.sigmoid(), gate)[0]
    better = torch.autograd.grad(refined(gate, torch.tensor(-3.0).double()).exp(), gate)[0]
    assert better > 1.5 * plain


def test_gates_beyond_what_numbers_hold_have_finite_gradients() -> None:
    gate, refine = (torch.tensor([-1e4, 1e4]).repeat(2).requires_grad_() for _ in range(2))
    found = refined(gate, refine)
    assert bool((found <= 0).all())
    for grad in torch.autograd.grad(found.sum(), (gate, refine)):
        assert bool(grad.isfinite().all())


def test_regla_scales_products_of_gaussian_exponentials_to_unit_variance() -> None:
    x, y = torch.randn(2, 400_000, 8).double()
    products = (x.exp() * y.exp()).sum(-1) * variance_scale(8)
    assert 0.75 < products.var() < 1.25


def test_regla_is_a_decayed_sum_of_exponentials_whatever_the_largest_key() -> None:
    layer = attlas.make("regla", dim=16, heads=2).double()
    q, k, v, inputs = layer.prepare(torch.randn(1, 30, 16).double() * 3)
    found = layer.attend(q, k, v, inputs)
    decay = layer.gates(k, inputs)["log_decay"].exp()
    state, expected = torch.zeros(1, 2, 8, 8).double(), []
    for t in range(30):  # without a maximum at all
        state = decay[:, :, t, :, None] * state + k[:, :, t, :, None].exp() * v[:, :, t, None]
        expected.append(torch.einsum("bhd,bhde->bhe", q[:, :, t].exp(), state))
    cosine = torch.cosine_similarity(found, torch.stack(expected, dim=2), dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
