"""fast-weight-delta-rule: what a state holds under a key."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

import attlas
from attlas import ops


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
    found = layer.mapped(x)
    assert found.shape[-1] == 2 * nu * 8
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]))
    r = torch.cat((x, -x), dim=-1).relu()
    raw = torch.cat([r * torch.cat((r[..., -i:], r[..., :-i]), -1) for i in range(1, nu + 1)], -1)
    torch.testing.assert_close(found * raw.sum(-1, keepdim=True), raw)


def test_l2_keys_with_full_strength_are_projected_out_before_they_are_written() -> None:
    layer = _made(feature="identity", norm="l2")
    k = layer.mapped(torch.randn(1, 2, 12, 8).double())
    v = torch.randn(1, 2, 12, 8).double()
    out, _ = ops.recurrence(k, k, v, beta=torch.ones(1, 2, 12).double())
    torch.testing.assert_close(out, v)  # what was just written is read again exactly


@pytest.mark.parametrize(
    "options", [{}, {"feature": "elu", "normalize": True}, {"norm": "l2", "nu": 2}]
)
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


@pytest.mark.parametrize("keys", [True, False])
def test_outputs_are_divided_with_or_without_the_keys_and_so_step_by_step(keys: bool) -> None:
    layer = _made(feature="elu", normalize=True, normalize_keys=keys)
    x = torch.randn(2, 9, 16).double()
    q, k, v, inputs = layer.prepare(x)
    phi, total = layer.mapped(k), layer.mapped(k).cumsum(2)
    beta = layer.beta_proj(x).sigmoid().mT
    if keys:
        kappa = ((total - phi) * phi).sum(-1)
        kappa[:, :, 0] = 1.0
        phi, beta = phi / (kappa + layer.eps)[..., None], beta * kappa
    out, _ = ops.recurrence(layer.mapped(q), phi, v, beta=beta)
    out = out / ((total * layer.mapped(q)).sum(-1, keepdim=True) + layer.eps)
    torch.testing.assert_close(layer(x), layer.output(out, inputs))
    cache = layer.init_cache()
    steps = [layer(part, cache=cache) for part in x.split([4, 1, 4], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), layer(x))
