"""What `attlas.network` keeps: constants, and state that moves once a training pass."""

from __future__ import annotations

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import attlas
from attlas.positions import ALiBi, Learned, Position, RoPE, Sinusoidal, T5Bias

ENCODINGS = {
    "rope": lambda: RoPE(8, 1e4), "yarn": lambda: RoPE(8, scaling="yarn", factor=4.0),
    "alibi": lambda: ALiBi(2), "sinusoidal": lambda: Sinusoidal(16), "learned": lambda: Learned(16),
    "t5": lambda: T5Bias(2),
}  # fmt: skip


def _told(encoding: Position) -> list[torch.Tensor]:
    torch.manual_seed(0)
    at, scores = torch.tensor([0, 7, 1000]), torch.zeros(1, 2, 300, 300)
    change = encoding.score_mod
    biased = scores if change is None else change(scores, *attlas.ops.indices(scores, 0))
    return [
        encoding.rotate(torch.randn(1, 2, 3, 8), at),
        encoding.embed(torch.randn(1, 3, 16), at),
        biased,
    ]


@pytest.mark.parametrize("name", ENCODINGS)
def test_an_encoding_made_on_meta_is_the_same_once_it_is_real(name: str) -> None:
    real = ENCODINGS[name]()
    with torch.device("meta"):
        emptied, assigned = ENCODINGS[name](), ENCODINGS[name]()
    emptied.to_empty(device="cpu").load_state_dict(real.state_dict())
    assigned.load_state_dict(real.state_dict(), assign=True)
    held = io.BytesIO()
    torch.save(real, held)
    held.seek(0)
    rounded = copy.deepcopy(real).bfloat16().float()
    rounded.load_state_dict(real.state_dict())
    for other in (
        emptied,
        assigned,
        rounded,
        copy.deepcopy(real),
        torch.load(held, weights_only=False),
    ):
        for found, wanted in zip(_told(other), _told(real), strict=True):
            assert torch.equal(found, wanted)


def test_constants_are_no_buffers_and_work_in_meta_passes() -> None:
    with torch.device("meta"):
        layer = attlas.make("retention", dim=16, heads=2, position="rope")
        assert layer(torch.empty(1, 5, 16)).shape == (1, 5, 16)
    assert not list(layer.buffers())
    assert layer.log_decay.device.type == "cpu"
    with torch.inference_mode():
        made = RoPE(8)
    assert not made.frequencies.is_inference()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["transformer-vq", "affine-scaled-attention"])
def test_a_layer_used_twice_is_checkpointed_with_the_state_of_each_use(
    name: str, reentrant: bool
) -> None:
    torch.manual_seed(0)
    layer = attlas.make(name, dim=16, heads=2, causal=True).double().train()
    x = torch.randn(2, 9, 16, dtype=torch.float64)

    def trained(run: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mine, inputs = copy.deepcopy(layer), x.clone().requires_grad_()
        h = inputs
        for _ in range(3):
            h = run(mine, h)
        h.square().sum().backward(retain_graph=not reentrant)
        return inputs.grad, mine.state_dict()

    (plain, state), (again, held) = (
        trained(run)
        for run in (lambda mine, h: mine(h), partial(checkpoint, use_reentrant=reentrant))
    )
    torch.testing.assert_close(again, plain)
    for key, wanted in state.items():
        torch.testing.assert_close(held[key], wanted)


def test_a_copy_has_no_loss_of_a_training_pass() -> None:
    layer = attlas.make("mixture-of-head", dim=16, heads=4).train()
    layer(torch.randn(1, 5, 16))
    assert layer.auxiliary_loss is not None
    assert copy.deepcopy(layer).auxiliary_loss is None
    assert nn.Sequential(copy.deepcopy(layer))[0].training
