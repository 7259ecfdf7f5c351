"""Runs that are kept and patched: nothing changes nothing, everything gives the other run, to the bit."""

from __future__ import annotations

import copy

import pytest
import torch

import attlas
from attlas.contract.families import find
from attlas.contract.parts import prompt, small_llama
from attlas.errors import UserError
from attlas.inspect.prompts import Prompts, effect, logit_difference
from attlas.inspect.readout import readout
from attlas.inspect.runs import (
    by_layer,
    differences,
    faithfulness,
    kept,
    logits_with,
    mean_heads,
    patched_heads,
    patched_points,
    without,
)
from attlas.inspect.weights import attention_of, head_weights
from attlas.parts.patch.replace import Replace, ReplacePattern
from attlas.parts.record.activations import Activations

EVERY = ("residual", "attention", "mlp", "final", "heads", "q", "k", "v")
FAMILIES = ("llama", "gpt2", "gemma2")


def decoder() -> attlas.Decoder:
    torch.manual_seed(0)
    config = attlas.DecoderConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return attlas.Decoder(config).double().eval()


def models():
    return {name: find(name).model() for name in FAMILIES} | {"ours": decoder(), "small": small_llama()}


@pytest.fixture(scope="module")
def two_texts():
    ids = prompt(9, batch=2)
    other = ids.clone()
    other[:, 3] = (ids[:, 3] + 11) % 60 + 2
    return ids, other


@pytest.mark.parametrize("name", [*FAMILIES, "ours"])
@pytest.mark.parametrize("point", EVERY)
def test_patching_with_the_same_run_changes_nothing_to_the_bit(name, point, two_texts) -> None:
    model = models()[name]
    run = kept(model, two_texts[0], (point,))
    patched = logits_with(model, two_texts[0], Replace({point: run.passed[point]}))
    assert torch.equal(patched, run.logits)


@pytest.mark.parametrize("name", [*FAMILIES, "ours"])
@pytest.mark.parametrize("point", ["residual", "final"])
def test_patching_all_of_the_stream_gives_the_other_run_to_the_bit(name, point, two_texts) -> None:
    model = models()[name]
    other = kept(model, two_texts[1], (point,))
    patched = logits_with(model, two_texts[0], Replace({point: other.passed[point]}))
    assert torch.equal(patched, other.logits)
    assert not torch.equal(patched, kept(model, two_texts[0], ()).logits)


@pytest.mark.parametrize("name", [*FAMILIES, "ours"])
def test_patching_heads_and_mlps_of_the_other_run_leaves_only_the_embedding(name, two_texts) -> None:
    model = models()[name]
    ids, other = two_texts
    run = kept(model, other, ("heads", "mlp", "residual"))
    last = {point: run.passed[point] for point in ("heads", "mlp")}
    first = Replace({"residual": run.passed["residual"]}, layers=[0])
    assert torch.equal(logits_with(model, ids, first, Replace(last)), run.logits)


def test_positions_and_heads_alone_are_replaced(two_texts) -> None:
    model = small_llama()
    other = kept(model, two_texts[1], ("heads",)).passed["heads"]
    part = Replace({"heads": other}, heads={2: [1]}, positions=(-1,))
    before = kept(model, two_texts[0], ("heads",)).passed["heads"]
    after = kept(model, two_texts[0], ("heads",), part).passed["heads"]
    assert torch.equal(after[:2], before[:2])
    assert torch.equal(after[2, :, -1, 1], other[2, :, -1, 1])
    changed = (after[2] != before[2]).any(dim=-1)
    assert changed[:, -1, 1].all()
    changed[:, -1, 1] = False
    assert not changed.any()


def test_negative_positions_count_each_rows_own_tokens(two_texts) -> None:
    model, ids = small_llama(), two_texts[0]
    padded = torch.cat([torch.zeros_like(ids[:, :3]), ids], dim=1)
    mask = (padded != 0).long()
    constant = torch.full((6, 1, 1, 4, 8), 0.5, dtype=torch.float64)
    part = Replace({"heads": constant}, positions=(2, -1))
    with torch.no_grad(), attlas.attach(model, part):
        plain = model(ids).logits
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        shifted = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    assert torch.allclose(shifted, plain, atol=1e-6)


def test_a_pattern_of_another_run_gives_its_weights(two_texts) -> None:
    model = small_llama()
    with torch.no_grad(), attlas.attach(model, record=["weights"]) as session:
        model(two_texts[1])
    other = session["weights"]
    with torch.no_grad(), attlas.attach(model, ReplacePattern(other), record=["weights"]) as session:
        model(two_texts[0])
    assert torch.equal(session["weights"], other)


def test_gradients_of_what_was_recorded_are_those_of_the_model(two_texts) -> None:
    model, ids = decoder(), two_texts[0]  # Llama's own norms run in single precision
    recorder = Activations(("heads", "q", "v"), gradients=True)
    with attlas.attach(model, record=[recorder], compile=False):
        target = model(ids).logits[:, -1, 5].sum()
    heads = [recorder.layer("heads", layer) for layer in range(3)]
    slopes = torch.autograd.grad(target, [*heads, recorder.layer("q", 1), recorder.layer("v", 1)])
    run, step = kept(model, ids, ("heads", "q", "v")), 1e-5
    for point, layer, slope in (("heads", 2, slopes[2]), ("q", 1, slopes[-2]), ("v", 1, slopes[-1])):
        moved = run.passed[point].clone()
        moved[layer, 0, 4, 1, 3] += step
        after = logits_with(model, ids, Replace({point: moved}, layers=[layer]))[:, -1, 5].sum()
        numeric = (after - target.detach()) / step
        assert torch.isclose(numeric, slope[0, 4, 1, 3], rtol=1e-3, atol=1e-7)


def test_gradients_through_a_model_whose_weights_ask_for_none(two_texts) -> None:
    model = small_llama().requires_grad_(False)
    recorder = Activations(("heads",), gradients=True)
    with attlas.attach(model, record=[recorder], compile=False):
        target = model(two_texts[0]).logits[:, -1, 5].sum()
    (slope,) = torch.autograd.grad(target, [recorder.layer("heads", 0)])
    assert slope.abs().sum() > 0


def test_leaving_the_block_leaves_no_trace(two_texts) -> None:
    model = small_llama()
    before, state = model(two_texts[0]).logits, copy.deepcopy(model.state_dict())
    kept(model, two_texts[1], EVERY, Replace({"residual": torch.zeros(6, 1, 1, 32)}))
    assert torch.equal(model(two_texts[0]).logits, before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2", "ours", "phi3-long"])
def test_the_weights_of_a_head_make_its_output(name, two_texts) -> None:
    model = find("phi3-long").model() if name == "phi3-long" else models()[name]
    run = kept(model, two_texts[0], ("heads", "attention"))
    for layer in range(2):
        weights = head_weights(model, layer)
        made = torch.einsum("bthd,hdw->btw", run.passed["heads"][layer], weights.o) + weights.o_bias
        assert torch.allclose(made, run.passed["attention"][layer], atol=1e-5)
    # Values are not rotated: they are the projection of the stream behind the norm.
    states = {}
    module, heads, kv_heads = attention_of(model, 0)
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: states.update(x=args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    values = kept(model, two_texts[0], ("v",)).passed["v"][0]
    handle.remove()
    weights = head_weights(model, 0)
    made = torch.einsum("btw,hwd->bthd", states["x"], weights.v) + weights.v_bias
    assert torch.allclose(made, values.repeat_interleave(heads // kv_heads, dim=2), atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "ours"])
def test_attributions_add_up_to_the_logits(name, two_texts) -> None:
    model = models()[name]
    run = kept(model, two_texts[0], ("residual", "attention", "mlp", "final"))
    read = readout(model)
    final = run.passed["final"][0]
    pieces = torch.cat([run.passed["residual"][:1], run.passed["attention"], run.passed["mlp"]])
    assert torch.allclose(pieces.sum(0), final, atol=1e-5)
    logits = read.linear(final, pieces) @ read.weight
    assert torch.allclose(logits.sum(0) + read.offset, run.logits, atol=1e-4)


def test_effects_of_heads_and_points(two_texts) -> None:
    model = small_llama()
    prompts = Prompts(*two_texts, torch.tensor([[5, 9], [11, 3]]))
    found = patched_heads(model, prompts)
    assert found.shape == (6, 4)
    clean, corrupted = differences(model, prompts)
    values = kept(model, prompts.clean, ("heads",)).passed["heads"]
    by_hand = logits_with(model, prompts.corrupted, Replace({"heads": values}, heads={3: [2]}))
    score = logit_difference(by_hand, prompts.answers).mean()
    assert torch.isclose(found[3, 2], (score - corrupted) / (clean - corrupted))
    points = patched_points(model, prompts, "residual")
    assert points[0, 3] == 1.0  # the only token that differs, before anything has read it
    assert points[0, 4] == 0.0
    identical = Prompts(prompts.clean, prompts.clean, prompts.answers)
    with pytest.raises(UserError, match="same logit difference"):
        patched_heads(model, identical)


def test_faithfulness_of_everything_is_one_and_ablation_is_told(two_texts) -> None:
    model = small_llama()
    prompts = Prompts(*two_texts, torch.tensor([[5, 9], [11, 3]]))
    means = mean_heads(model, prompts.corrupted)
    every = [(layer, head) for layer in range(6) for head in range(4)]
    assert faithfulness(model, prompts, every, means) == 1.0
    assert faithfulness(model, prompts, every[:3], means) != 1.0
    (part,) = without(by_layer(every[:2]), means)
    found = kept(model, prompts.clean, ("heads",), part).passed["heads"]
    assert torch.equal(found[0, :, :, :2], means[0, :2].expand_as(found[0, :, :, :2]))


def test_effect_is_a_share_of_what_there_is_to_restore() -> None:
    assert effect(torch.tensor(3.0), torch.tensor(5.0), torch.tensor(1.0)) == 0.5


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"by": {"hats": torch.zeros(6, 1, 1, 4, 8)}}, "hats"),
        ({"by": {"heads": torch.zeros(2, 1, 1, 4, 8)}}, "layers"),
        ({"by": {"heads": torch.zeros(6, 1, 1, 3, 8)}}, "what passes"),
        ({"by": {"mlp": torch.zeros(6, 1, 1, 32)}, "heads": [0]}, "heads"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, word, two_texts) -> None:
    with pytest.raises(UserError, match=word):
        logits_with(small_llama(), two_texts[0], Replace(**options))
