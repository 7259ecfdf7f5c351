"""fast-weight-delta-rule and error-free-linear-attention: what a state holds under a key."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.nn.functional import normalize

import attlas
from attlas import ops
from attlas.layers.linear.error_free import exact_step


def _made(**options: object) -> torch.nn.Module:
    return attlas.make("fast-weight-delta-rule", dim=16, heads=2, **options).double()


@pytest.mark.parametrize("beta", [1.0, 0.5, 0.0])
def test_delta_rule_replaces_what_stood_under_a_key_by_a_share(beta: float) -> None:
    k = torch.eye(8).double().repeat(2, 1)[None, None]  # every key twice
    v = torch.randn(1, 1, 16, 4).double()
    strength = torch.cat((torch.ones(8), torch.full((8,), beta)))[None, None].double()
    _, state = ops.recurrence(k, k, v, beta=strength)
    first, second = v[0, 0].chunk(2)
    torch.testing.assert_close(state[0, 0], first + beta * (second - first))


def test_additive_update_keeps_both_values_of_a_key() -> None:
    k = torch.eye(4).double().repeat(2, 1)[None, None]
    v = torch.randn(1, 1, 8, 4).double()
    _, state = ops.recurrence(k, k, v)
    torch.testing.assert_close(state[0, 0], v[0, 0, :4] + v[0, 0, 4:])


@pytest.mark.parametrize("nu", [1, 2, 3])
def test_dpfp_features_are_products_of_neighbours_and_sum_to_one(nu: int) -> None:
    layer = _made(nu=nu)
    x = torch.randn(2, 2, 5, 8).double()
    found, _ = layer.features(x, x)
    assert found.shape[-1] == 2 * nu * 8
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))
    r = torch.cat((x, -x), dim=-1).relu()
    raw = torch.cat([r * torch.cat((r[..., -i:], r[..., :-i]), -1) for i in range(1, nu + 1)], -1)
    torch.testing.assert_close(found * raw.sum(-1, keepdim=True), raw)


def test_l2_keys_with_full_strength_are_projected_out_before_they_are_written() -> None:
    layer = _made(feature="identity", norm="l2")
    k = layer.features(*2 * (torch.randn(1, 2, 12, 8).double(),))[1]
    v = torch.randn(1, 2, 12, 8).double()
    out, _ = ops.recurrence(k, k, v, beta=torch.ones(1, 2, 12).double())
    torch.testing.assert_close(out, v)  # what was just written is read again exactly


@pytest.mark.parametrize("options", [{}, {"feature": "elu", "normalize": True}, {"norm": "l2", "nu": 2}])
def test_grouped_keys_write_with_one_strength_for_their_group(options: dict[str, object]) -> None:
    layer = _made(kv_heads=1, **options)
    whole = _made(**options)
    weights = layer.state_dict()
    for name in ("k_proj.weight", "v_proj.weight", "beta_proj.weight"):
        weights[name] = weights[name].repeat(2, 1)
    whole.load_state_dict(weights)
    x = torch.randn(2, 9, 16).double()
    torch.testing.assert_close(layer(x), whole(x))


def test_normalize_divides_by_the_sum_of_all_weights_when_updates_add() -> None:
    layer = _made(feature="elu", norm="none", update="additive", normalize=True, eps=0.0)
    weights = layer.weights(torch.randn(1, 7, 16).double())
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


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


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"feature": "relu"}, "feature"), ({"norm": "l1"}, "norm"), ({"update": "hebb"}, "update"),
        ({"nu": 0}, "nu"), ({"eps": -1.0}, "eps"), ({"feature": "identity"}, "norm"),
        ({"causal": False}, "causal"), ({"mask": attlas.masks.window(2)}, "mask"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises((ValueError, TypeCheckError), match=named):
        _made(**options)
