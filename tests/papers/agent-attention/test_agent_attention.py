"""Agent attention: two softmax maps by way of pooled queries."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from jaxtyping import config

import attlas

OPTIONS = {"dim": 16, "heads": 2, "agents": 4}


def test_the_map_is_a_product_of_two_softmaxes() -> None:
    layer = attlas.make("agent-attention", grid=(4, 6), **OPTIONS).eval()
    x = torch.randn(2, 24, 16)
    q, k, _, inputs = layer.prepare(x)
    spread, gather = layer.features(q, k, inputs)
    gather = gather.mT
    assert torch.allclose(spread.sum(-1), torch.ones(2, 2, 24))
    assert torch.allclose(gather.sum(-1), torch.ones(2, 2, 4))
    assert torch.allclose(layer.weights(x), spread @ gather)
    assert torch.linalg.matrix_rank(layer.weights(x)).max() <= 4


def test_agents_are_means_of_the_cells_queries() -> None:
    layer = attlas.make("agent-attention", grid=(4, 4), **OPTIONS)
    q = torch.randn(1, 2, 16, 8)
    cells = q.unflatten(2, (2, 2, 2, 2)).mean((3, 5)).flatten(2, 3)
    assert torch.allclose(layer.pooled(q, (4, 4)), cells, atol=1e-6)


def test_as_many_agents_as_patches_are_the_queries() -> None:
    layer = attlas.make(
        "agent-attention", dim=16, heads=2, agents=16, grid=(4, 4), place_bias=False
    )
    x = torch.randn(1, 16, 16)
    q, k, _, _ = layer.prepare(x)
    twice = (q @ q.mT * 8**-0.5).softmax(-1) @ (q @ k.mT * 8**-0.5).softmax(-1)
    assert torch.allclose(layer.weights(x), twice, atol=1e-6)


def test_without_biases_and_convolution_a_softmax_layer_gives_its_weights() -> None:
    """The published training-free replacement: the same parameters, a map of lower rank."""
    softmax = attlas.make("softmax", dim=16, heads=2, bias=True)
    agent = attlas.make(
        "agent-attention",
        place_bias=False,
        kernel_size=None,
        grid=(3, 3),
        dim=16,
        heads=2,
        agents=9,
    )
    agent.load_state_dict(softmax.state_dict())
    x = torch.randn(1, 9, 16)
    assert torch.equal(agent.prepare(x)[0], softmax.prepare(x)[0])


def test_the_convolution_is_added_once() -> None:
    layer = attlas.make("agent-attention", grid=(4, 4), **OPTIONS).eval()
    x = torch.randn(1, 16, 16)
    whole = layer(x)
    conv, layer.conv = layer.conv, None
    plain = layer(x)
    neighbours = layer.o_proj(conv(layer.v_proj(x), (4, 4))) - layer.o_proj.bias
    assert torch.allclose(whole, plain + neighbours, atol=1e-6)


@pytest.fixture
def as_users() -> Iterator[None]:
    """Without the run-time checks of shapes, which hold keys to be as many as tokens."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def test_fewer_keys_by_patches(as_users: None) -> None:
    layer = attlas.make("agent-attention", grid=(4, 6), reduction=2, **OPTIONS).eval()
    assert layer.gather_bias((2, 3)).shape == (2, 4, 6)
    assert layer(torch.randn(1, 24, 16)).shape == (1, 24, 16)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="agents must be a square number, got 5"):
        attlas.make("agent-attention", dim=16, heads=2, agents=5)
    with pytest.raises(ValueError, match="reduction=2 must divide the grid"):
        attlas.make("agent-attention", grid=(3, 4), reduction=2, **OPTIONS)
