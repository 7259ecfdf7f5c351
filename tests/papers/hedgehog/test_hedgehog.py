"""hedgehog: learned features that start as spiky as a softmax."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

import attlas

ACTIVATIONS = ("softmax", "exp")


def _entropy(weights: torch.Tensor) -> float:
    return -(weights * weights.clamp(min=1e-30).log()).sum(-1).mean().item()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hedgehog_starts_from_the_identity(activation: str) -> None:
    layer = attlas.make("hedgehog", dim=16, heads=2, activation=activation)
    q = torch.randn(1, 2, 5, 8)
    found, _ = layer.features(q, q, layer.prepare(torch.zeros(1, 5, 16))[-1])
    halves = [each.softmax(-1) for each in (q, -q)]
    if activation == "exp":
        halves = [half / half.amax(-1, keepdim=True) for half in halves]
    torch.testing.assert_close(found, torch.cat(halves, dim=-1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hedgehog_linear_and_explicit_forms_agree(activation: str) -> None:
    layer = attlas.make("hedgehog", dim=16, heads=2, activation=activation, causal=True).double()
    x = torch.randn(2, 70, 16).double()
    q, k, v, inputs = layer.prepare(x)
    weights = layer.weigh(q, k, inputs)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert bool((weights >= 0).all())
    torch.testing.assert_close(layer.attend(q, k, v, inputs), weights @ v)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_hedgehog_sharpens_with_its_logits_where_elu_does_not(activation: str) -> None:
    torch.manual_seed(0)
    hedgehog = attlas.make("hedgehog", dim=16, heads=1, activation=activation)
    plain = attlas.make("linear-attention", dim=16, heads=1)
    plain.load_state_dict({n: w for n, w in hedgehog.state_dict().items() if "proj" in n})
    x = torch.randn(1, 32, 16)
    fall = [_entropy(layer.weights(x)) - _entropy(layer.weights(30 * x))
            for layer in (hedgehog, plain)]  # fmt: skip
    assert fall[0] > 1.0
    assert fall[0] > 2 * fall[1]


def test_hedgehog_maps_queries_and_keys_of_every_head_apart() -> None:
    layer = attlas.make("hedgehog", dim=32, heads=4, kv_heads=2, feature_dim=5)
    assert layer.q_map.shape == (4, 8, 5)
    assert layer.k_map.shape == (2, 8, 5)
    q, k = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    inputs = layer.prepare(torch.zeros(1, 3, 32))[-1]
    before = layer.features(q, k, inputs)
    with torch.no_grad():
        layer.q_map[1] += 1.0
        layer.q_map[1, 0] += 1.0
    after = layer.features(q, k, inputs)
    changed = (after[0] != before[0]).flatten(2).any(-1)[0]
    assert changed.tolist() == [False, True, False, False]
    torch.testing.assert_close(after[1], before[1])


def test_hedgehog_refuses_what_it_does_not_know() -> None:
    for name, value in {"eps": -1.0, "feature_dim": 0}.items():
        with pytest.raises(ValueError, match=name):
            attlas.make("hedgehog", dim=16, heads=2, **{name: value})
    with pytest.raises((ValueError, TypeCheckError), match="activation"):
        attlas.make("hedgehog", dim=16, heads=2, activation="relu")
