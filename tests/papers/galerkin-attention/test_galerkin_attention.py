"""galerkin-attention: softmax-free attention of points, in time linear in their number."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attlas
from attlas.train.operator import Operator

TYPES = ("galerkin-attention", "fourier-attention", "galerkin-linear-attention")


def _layer(name: str, **options):
    torch.manual_seed(0)
    layer = attlas.make(name, **{"dim": 16, "heads": 2, **options}).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer


@pytest.mark.parametrize("name", TYPES)
def test_galerkin_attention_doubles_its_work_when_n_doubles(name: str) -> None:
    layer = attlas.make(name, dim=32, heads=2)
    work = []
    for points in (256, 512):
        with FlopCounterMode(display=False) as count:
            layer(torch.randn(1, points, 32))
        work.append(count.get_total_flops())
    assert work[1] == 2 * work[0]


@pytest.mark.parametrize("name", TYPES)
def test_galerkin_attention_counts_and_sums_only_what_a_row_sees(name: str) -> None:
    layer = _layer(name, coordinates=2)
    x, places = torch.randn(2, 9, 16).double(), torch.rand(2, 9, 2).double()
    valid = torch.arange(9) < 6
    alone = layer(x[:, :6], coordinates=places[:, :6])
    padded = layer(x, coordinates=places, mask=valid.expand(2, -1))[:, :6]
    by_pairs = layer(x, coordinates=places, mask=valid.expand(2, 1, 9, 9))[:, :6]
    torch.testing.assert_close(padded, alone)
    torch.testing.assert_close(by_pairs, alone)


def test_galerkin_attention_starts_near_a_hundredth_of_the_identity() -> None:
    layer = attlas.make("galerkin-attention", dim=32, heads=4)
    torch.testing.assert_close(layer.q_proj.weight, 0.01 * torch.eye(32), atol=1e-4, rtol=0)
    assert layer.k_gain.shape == layer.v_gain.shape == (4, 1, 8)
    assert not hasattr(layer, "q_gain")


def test_galerkin_attention_refuses_coordinates_that_do_not_fit() -> None:
    x, places = torch.randn(1, 5, 16).double(), torch.rand(1, 5, 1).double()
    with pytest.raises(ValueError, match="coordinates"):
        _layer("galerkin-attention", coordinates=1)(x)
    with pytest.raises(ValueError, match="coordinates"):
        _layer("galerkin-attention")(x, coordinates=places)
    with pytest.raises(ValueError, match="context_coordinates"):
        _layer("galerkin-attention", coordinates=1)(x, x, coordinates=places)
    with pytest.raises(ValueError, match="coordinates"):
        _layer("galerkin-attention", coordinates=-1)
    with pytest.raises(ValueError, match="position"):
        _layer("fourier-attention", position="alibi")


@pytest.mark.parametrize("name", TYPES)
def test_without_norms_galerkin_attention_has_none_to_train_and_is_linear_in_values(name: str) -> None:
    layer = _layer(name, norm="none", bias=False)
    assert not [n for n, _ in layer.named_parameters() if n.endswith(("gain", "shift"))]
    x = torch.randn(2, 9, 16).double()
    q, k, v, inputs = layer.prepare(x)
    twice = layer.attend(q, k, 2 * v, inputs)
    torch.testing.assert_close(twice, 2 * layer.attend(q, k, v, inputs))
    torch.testing.assert_close(layer(x), layer.output(layer.weights(x) @ v, inputs))


def test_operator_learners_give_heads_the_places_of_points() -> None:
    """The place tells points apart where the field is the same everywhere and the reading ignores it."""
    torch.manual_seed(0)
    learner = Operator(2, 1, 16, 1, 2, "galerkin-attention", {"coordinates": 1})
    with torch.no_grad():
        learner.read.weight[:, 1] = 0
        for weight in learner.layers[0].attention.parameters():
            weight += 0.3 * torch.randn_like(weight)
    values = torch.ones(1, 5, 2)
    values[..., 1] = torch.arange(5) / 5
    assert learner(values).std(dim=1) > 1e-3
    with pytest.raises(ValueError, match="coordinates must be 0 or 1"):
        Operator(2, 1, 16, 1, 2, "galerkin-attention", {"coordinates": 2})
