"""error-free-linear-attention: what a state holds under a key, as its equation has it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from attlas import ops
from attlas.layers.linear.error_free import exact_step


def _by_matrix_exponential(k: Tensor, v: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """dS/dt = −k kᵀ S + k vᵀ over β, as one exponential of the joined system [S; vᵀ]."""
    d = len(state)
    system = torch.zeros(d + 1, d + 1, dtype=k.dtype)
    system[:d, :d], system[:d, d] = -torch.outer(k, k), k
    flow = torch.linalg.matrix_exp(beta * system)
    return flow[:d] @ torch.cat((state, v[None]))


def test_efla_step_is_the_solution_of_its_equation() -> None:
    k, v = torch.randn(1, 1, 9, 6).double() * 2, torch.randn(1, 1, 9, 4).double()
    beta = torch.rand(1, 1, 9).double()
    _, found = ops.recurrence(k, k, v, beta=exact_step(k, beta))
    state = torch.zeros(6, 4).double()
    for key, value, time in zip(k[0, 0], v[0, 0], beta[0, 0], strict=True):
        state = _by_matrix_exponential(key, value, time, state)
    torch.testing.assert_close(found[0, 0], state)


def test_efla_is_the_delta_rule_for_short_keys_and_never_steps_too_far() -> None:
    k, beta = torch.randn(1, 1, 50, 8).double(), torch.rand(1, 1, 50).double()
    torch.testing.assert_close(exact_step(1e-6 * k, beta), beta)
    torch.testing.assert_close(exact_step(0 * k, beta), beta)
    shares = exact_step(1e3 * k, beta) * (1e3 * k).square().sum(-1)
    assert bool((shares <= 1).all())


def test_efla_stays_bounded_where_eulers_step_grows_without_bound() -> None:
    k, v = 4 * normalize(torch.randn(1, 1, 200, 8).double(), dim=-1), torch.randn(1, 1, 200, 8).double()
    beta = torch.full((1, 1, 200), 0.5).double()
    euler, _ = ops.recurrence(k, k, v, beta=beta)
    exact, _ = ops.recurrence(k, k, v, beta=exact_step(k, beta))
    assert euler.abs().max() > 1e6
    assert exact.abs().max() < 100
