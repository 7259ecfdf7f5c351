"""arwkv-rwkv7: what its state takes away, what it begins with, and where its values go."""

from __future__ import annotations

import math

import pytest
import torch
from jaxtyping import TypeCheckError

import attlas
from attlas.bases.packing import token_before


def _made(**options: object) -> torch.nn.Module:
    layer = attlas.make("arwkv-rwkv7", dim=16, heads=2, ranks=(4, 4, 4, 4), **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer.eval()


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_layer_is_its_recurrence_token_by_token(kv_heads: int) -> None:
    layer = _made(kv_heads=kv_heads)
    x = torch.randn(1, 7, 16).double()
    q, k, v, inputs = layer.prepare(x)
    gates = layer.gates(k, inputs)
    eta = layer.steps(inputs)
    kappa = torch.nn.functional.normalize(k * layer.kappa, dim=-1)
    keys = k * (1 + (eta - 1) * layer.alpha)
    rows = [each.repeat_interleave(2 // kv_heads, 1) for each in (keys, v, kappa, eta)]
    decay = gates["log_decay"].exp().repeat_interleave(2 // kv_heads, 1)
    keys, values, kappa, eta = rows
    state, outs = torch.zeros(1, 2, 8, 8).double(), []
    for t in range(7):
        held = (kappa[:, :, t, None] @ state)[:, :, 0]
        taken = (kappa * eta)[:, :, t, :, None] * held[:, :, None]
        written = keys[:, :, t, :, None] * values[:, :, t, None]
        state = decay[:, :, t, :, None] * state - taken + written
        read = (q[:, :, t, None] @ state)[:, :, 0]
        bonus = (q[:, :, t] * layer.rho[:, 0] * keys[:, :, t]).sum(-1, keepdim=True)
        outs.append(read + bonus * values[:, :, t])
    torch.testing.assert_close(layer.attend(q, k, v, inputs), torch.stack(outs, dim=2))


def test_decays_lie_between_the_fastest_and_none() -> None:
    layer = _made()
    _, k, *_, inputs = layer.prepare(100 * torch.randn(2, 9, 16).double())
    decay = layer.gates(k, inputs)["log_decay"]
    assert -math.exp(-0.5) - 1e-12 <= decay.min() < decay.max() <= 0


def test_gates_begin_at_one_for_arwkv_and_at_nothing_for_rwkv7() -> None:
    x = torch.randn(1, 5, 16)
    outs = {}
    for gate in ("arwkv", "rwkv7", "none"):
        torch.manual_seed(0)
        layer = attlas.make("arwkv-rwkv7", dim=16, heads=2, gate=gate)
        with torch.no_grad():
            layer.o_proj.weight.copy_(torch.eye(16))
            if gate != "none":
                layer.out_gate.up.zero_()
        outs[gate] = layer(x)
    torch.testing.assert_close(outs["arwkv"], outs["none"])
    assert not outs["rwkv7"].any()


def test_value_residual_moves_values_towards_those_of_the_first_layer() -> None:
    layer = _made(value_residual=True, layers=4, layer_idx=2)
    x, first = torch.randn(1, 5, 16).double(), torch.randn(1, 5, 16).double()
    with torch.no_grad():
        layer.toward_first.bias.fill_(1e3)
    v = layer.prepare(x, extras={"v_first": first})[2]
    torch.testing.assert_close(v.transpose(1, 2).flatten(2), first)
    with pytest.raises(ValueError, match="v_first"):
        layer(x)


def test_norm_has_two_maps_a_head_and_one_for_the_bonus_behind_it() -> None:
    layer = _made(norm=True)
    weights = layer.weights(torch.randn(1, 5, 16).double())
    assert weights.shape == (1, 4, 5, 5)
    off_diagonal = ~torch.eye(5, dtype=torch.bool)
    assert weights[:, ::2][..., off_diagonal].any()
    assert not weights[:, 1::2][..., off_diagonal].any()


def test_deeper_layers_begin_with_other_mixing_and_faster_decays_at_the_end() -> None:
    made = [attlas.make("arwkv-rwkv7", dim=16, heads=2, layers=6, layer_idx=i) for i in (0, 5)]
    assert not torch.equal(made[0].mix["r"], made[1].mix["r"])
    for layer in made:
        assert layer.decay.bias.diff().min() > 0
        assert layer.decay.bias[0] == -6.5
    assert made[1].decay.bias[8] < made[0].decay.bias[8]


def test_token_before_steps_over_padding() -> None:
    x = torch.arange(1.0, 7.0).view(1, 6, 1)
    valid = torch.tensor([[False, True, True, False, True, False]])
    before, last = token_before(x, valid, torch.tensor([[[9.0]]]))
    assert before[0, valid[0], 0].tolist() == [9.0, 2.0, 3.0]
    assert last.item() == 5.0
    before, last = token_before(x, torch.zeros_like(valid), torch.tensor([[[9.0]]]))
    assert last.item() == 9.0


def test_cache_holds_the_last_token_and_not_the_prompt() -> None:
    layer = _made()
    cache = layer.init_cache()
    strides = set()
    for tokens in (40, 1, 3):
        layer(torch.randn(1, tokens, 16, dtype=torch.float64), cache=cache)
        held = cache.layers[0].states["previous"]
        assert held.untyped_storage().nbytes() == held.nbytes
        strides.add(held.stride())
    assert len(strides) == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"gate": "relu"}, "gate"), ({"ranks": (0, 1, 1, 1)}, "ranks"),
        ({"layers": 2, "layer_idx": 2}, "layers"), ({"position": "rope"}, "position"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises((ValueError, TypeCheckError), match=named):
        attlas.make("arwkv-rwkv7", dim=16, heads=2, **options)
