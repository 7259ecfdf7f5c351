"""l2vit: a divisor with a floor, temperatures, a concentration module, and work linear in the tokens."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attlas


def _layer(**options):
    torch.manual_seed(0)
    layer = attlas.make("l2vit", **{"dim": 16, "heads": 2, **options}).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return layer


def test_l2vit_rows_sum_to_the_temperature_above_the_floor() -> None:
    x = torch.randn(2, 25, 16).double()
    layer = _layer(floor=1e-9)
    q, k, *_ = layer.prepare(x)
    total = layer.total(q.relu(), k.relu())
    sums = layer.weights(x).sum(-1, keepdim=True) / layer.temperature
    torch.testing.assert_close(sums[total > 0], torch.ones_like(sums[total > 0]))
    # Below it the floor divides, and rows are the lighter the smaller their products.
    floor = total.median().item()
    sums = _layer(floor=floor).weights(x).sum(-1, keepdim=True) / layer.temperature
    torch.testing.assert_close(sums, (total / floor).clamp(max=1.0))
    assert (sums < 0.99).any()


def test_l2vit_weights_are_of_rectified_products_and_temperatures_of_heads() -> None:
    layer = _layer(kv_heads=1)
    x = torch.randn(2, 25, 16).double()
    q, k, *_ = layer.prepare(x)
    scores = q.clamp(min=0) @ k.clamp(min=0).mT
    wanted = layer.temperature * scores / scores.sum(-1, keepdim=True).clamp(min=100)
    torch.testing.assert_close(layer.weights(x), wanted)
    assert (scores.sum(-1) > 100).any()
    assert (scores.sum(-1) < 100).any()


def test_l2vit_begins_with_softmax_attentions_scale_as_temperature() -> None:
    layer = attlas.make("l2vit", dim=64, heads=4)
    torch.testing.assert_close(layer.temperature, torch.full((4, 1, 1), 0.25))
    assert layer.o_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_l2vit_concentrates_what_attention_adds_to_the_input() -> None:
    layer, bare = _layer(grid=(3, 4)), _layer(grid=(3, 4), kernel_size=None)
    bare.load_state_dict({name: layer.state_dict()[name] for name in bare.state_dict()})
    x = torch.randn(2, 12, 16).double()
    found = bare(x)
    local = layer(x) - found
    torch.testing.assert_close(local, layer.concentration(layer.norm(x + found), (3, 4)))
    # Two kernels of 7 reach 6 places far: with one of 1 no place tells its neighbours anything.
    near = _layer(grid=(3, 4), kernel_size=1).concentration
    changed = x.clone()
    changed[:, 5] += 1
    moved = (near(changed, (3, 4)) - near(x, (3, 4))).abs().sum((0, 2))
    assert moved.nonzero().flatten().tolist() == [5]


def test_l2vit_norms_over_the_batch_while_training_and_by_what_it_saw_after() -> None:
    layer = _layer(kernel_size=3)
    x = torch.randn(4, 9, 16).double()
    before = layer(x)
    layer.train()(x)
    layer.eval()
    assert not torch.allclose(layer(x), before)
    torch.testing.assert_close(layer(x[:1]), layer(x)[:1])


def test_l2vit_doubles_its_work_when_the_picture_doubles() -> None:
    layer, work = attlas.make("l2vit", dim=32, heads=2, kernel_size=3), []
    for height in (16, 32):
        layer.grid = (height, 16)
        with FlopCounterMode(display=False) as count:
            layer(torch.randn(1, height * 16, 32))
        work.append(count.get_total_flops())
    assert work[1] == 2 * work[0]


def test_l2vit_refuses_what_does_not_fit() -> None:
    for options, name in (({"floor": 0.0}, "floor"), ({"kernel_size": 2}, "kernel_size")):
        with pytest.raises(ValueError, match=name):
            attlas.make("l2vit", dim=16, heads=2, **options)
    with pytest.raises(ValueError, match="grid"):
        _layer(grid=(2, 2), kernel_size=None)(torch.randn(1, 9, 16).double())
