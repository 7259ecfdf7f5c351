"""nalaformer: features without a sign, and attention that is the sharper the longer the query."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm, normalize, silu

import attlas
from attlas.layers.linear.nalaformer import parts


def _layer(**options):
    torch.manual_seed(0)
    layer = attlas.make("nalaformer", **{"dim": 16, "heads": 2, **options}).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return layer


def _entropies(weights: torch.Tensor) -> torch.Tensor:
    return -torch.xlogy(weights, weights).sum(-1)


def test_nalaformer_features_have_no_sign_and_opposites_do_not_meet() -> None:
    layer = _layer()
    x = torch.randn(2, 2, 9, 8).double()
    queries, keys = layer.sharpened(x), parts(-x) ** layer.power
    assert (queries >= 0).all()
    assert (keys >= 0).all()
    assert (queries * keys == 0).all()
    assert ((layer.sharpened(x) * parts(x) ** layer.power).sum(-1) > 0).all()
    weights = _layer(rotary=False).weights(torch.randn(2, 9, 16).double())
    assert (weights >= 0).all()


def test_nalaformer_powers_grow_with_the_query_and_keys_keep_their_length() -> None:
    layer = _layer(rotary=False, power=2.0, eps=1e-14)
    x = torch.randn(2, 9, 16).double()
    q, k, *_ = layer.prepare(x)
    power = 2 * (0.5 + q.norm(dim=-1, keepdim=True).tanh())
    direction = normalize(q, dim=-1)
    of_q = torch.cat([direction.clamp(min=0) ** power, (-direction).clamp(min=0) ** power], -1)
    of_k = torch.cat([k.clamp(min=0) ** 2, k.clamp(max=0) ** 2], -1)
    scores = of_q @ of_k.mT
    torch.testing.assert_close(layer.weights(x), scores / scores.sum(-1, keepdim=True))


def test_nalaformer_entropy_falls_as_the_query_grows() -> None:
    layer = _layer(rotary=False, eps=1e-15)
    q, k, _, inputs = layer.prepare(torch.randn(4, 25, 16).double())
    ours, plain = [], []
    for size in (0.01, 0.1, 0.3, 1.0):
        ours.append(_entropies(layer.weigh(size * q, k, inputs)).mean().item())
        scores = (size * q).relu() @ k.relu().mT
        plain.append(
            _entropies(scores / scores.sum(-1, keepdim=True).clamp(min=1e-300)).mean().item()
        )
    assert ours == sorted(ours, reverse=True)
    assert ours[0] - ours[-1] > 0.1
    assert max(plain) - min(plain) < 1e-9


def test_nalaformer_forms_agree_on_a_grid_of_any_shape() -> None:
    layer = _layer(grid=(2, 6), kv_heads=1)
    x = torch.randn(2, 12, 16).double()
    q, k, v, inputs = layer.prepare(x)
    weights = layer.weigh(q, k, inputs)
    torch.testing.assert_close(layer(x), layer.output(layer.aggregate(weights, v, inputs), inputs))


def test_nalaformer_norms_all_heads_together_before_the_gate() -> None:
    layer = _layer()
    x, heads = torch.randn(1, 9, 16).double(), torch.randn(1, 2, 9, 8).double()
    inputs = layer.prepare(x)[-1]
    joined = torch.cat([heads[:, 0], heads[:, 1]], dim=-1)
    normed = layer_norm(joined, (16,), layer.norm.weight, layer.norm.bias)
    wanted = layer.o_proj(normed * silu(layer.gate_proj(x)))
    torch.testing.assert_close(layer.output(heads, inputs), wanted)


def test_nalaformer_of_queries_that_are_zero_is_finite_with_its_gradients() -> None:
    layer = _layer()
    torch.nn.init.zeros_(layer.q_proj.bias)
    x = torch.zeros(1, 9, 16, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_nalaformer_refuses_a_power_below_one() -> None:
    with pytest.raises(ValueError, match="power"):
        attlas.make("nalaformer", dim=16, heads=2, power=0.5)
