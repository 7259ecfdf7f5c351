"""What the row of circuit reuse says, sentence by sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import attlas
from attlas.analyses.circuit_reuse import PathPatching, Paths, forced, overlap
from attlas.attach import attach
from attlas.contract.families import find
from attlas.contract.parts import prompt, small_llama
from attlas.errors import UserError
from attlas.inspect.prompts import Prompts, effect, logit_difference
from attlas.inspect.runs import kept, logits_with
from attlas.inspect.subject import Subject
from attlas.parts.patch.replace import Replace

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "circuits-cpu.json"
ANSWERS = torch.tensor([[5, 9], [11, 3]])


def decoder():
    torch.manual_seed(0)
    config = attlas.DecoderConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return attlas.Decoder(config).double().eval()


def model_of(name):
    return {"ours": decoder, "llama": small_llama}[name]() if name != "gpt2" else find(name).model()


def pairs():
    ids = prompt(9, batch=2)
    other = ids.clone()
    other[:, 3] = (ids[:, 3] + 11) % 60 + 2
    return Prompts(ids, other, ANSWERS)


def every(model):
    return [(x, h) for x in range(model.config.num_hidden_layers) for h in range(4)]


@pytest.mark.parametrize("name", ["ours", "llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"receivers": ((1, 1),), "through": "k", "freeze_mlps": True}])
def test_circuit_reuse_of_the_same_prompt_is_exactly_zero(name, options) -> None:
    same = Prompts(pairs().clean, pairs().clean, ANSWERS)
    found = PathPatching(**options).look(Subject(model_of(name), prompts=same))
    assert (found.heads["path effect"].values == 0).all()


@pytest.mark.parametrize("name", ["ours", "llama", "gpt2"])
def test_circuit_reuse_of_everything_is_one(name) -> None:
    model = model_of(name)
    paths = Paths(model, pairs(), None, "q", freeze_mlps=False)
    heads = range(model.config.num_attention_heads)
    everything = [(x, h) for x in range(model.config.num_hidden_layers) for h in heads]
    assert float(paths.effects([everything])) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("through", ["q", "k", "v", "heads"])
@pytest.mark.parametrize("freeze", [False, True])
def test_a_path_is_what_two_whole_runs_by_hand_give(through, freeze) -> None:
    """Without a cache: the sender swapped and the rest frozen, then the receiver given what it heard."""
    model, prompts, sender, receiver = decoder(), pairs(), (0, 2), (2, 1)
    clean = kept(model, prompts.clean, ("heads", "mlp"))
    other = kept(model, prompts.corrupted, ("heads",))
    mixed = clean.passed["heads"].clone()
    mixed[sender[0], :, -1, sender[1]] = other.passed["heads"][sender[0], :, -1, sender[1]]
    below = [Replace({"heads": mixed}, layers=[0, 1], positions=(-1,))]  # what the receiver's layer hears
    below += [Replace({"mlp": clean.passed["mlp"]}, layers=[0, 1], positions=(-1,))] if freeze else []
    heard = kept(model, prompts.clean, (through,), *below).passed[through]
    part = Replace({through: heard}, heads={receiver[0]: [receiver[1]]}, positions=(-1,))
    moved, base, end = (
        logit_difference(x, ANSWERS).mean()
        for x in (logits_with(model, prompts.clean, part), clean.logits, other.logits)
    )
    options = {"receivers": (receiver,), "through": through, "freeze_mlps": freeze}
    found = PathPatching(**options).look(Subject(model, prompts=prompts)).heads["path effect"].values
    assert float(found[sender]) == pytest.approx(float(effect(moved, end, base)), abs=1e-6)
    assert (found[2] == 0).all()


def test_the_logits_hear_the_last_layer_directly() -> None:
    """With the MLPs frozen and the final norm's size nearly the same, effects of heads nearly add up."""
    model = decoder()
    found = PathPatching(freeze_mlps=True).look(Subject(model, prompts=pairs()))
    values = found.heads["path effect"].values
    assert (values != 0).all()
    edges = found.arrays["circuit"]
    assert edges.shape == (12, 5)
    assert (edges[:, 2] == 3).all()
    assert (edges[:-1, 4].abs() >= edges[1:, 4].abs()).all()
    frozen = PathPatching(freeze_mlps=True, receivers=((2, -1),), through="residual")
    values = frozen.look(Subject(model, prompts=pairs())).heads["path effect"].values
    assert (values[2] == 0).all()
    assert (values[:2] != 0).all()


def test_sets_are_laid_over_each_other() -> None:
    first = [(0, h) for h in range(5)]
    found = overlap(first, [(0, 3), (0, 4), (1, 0), (1, 1)], total=20)
    assert found.shared == {(0, 3), (0, 4)}
    assert (found.share, found.expected) == (0.5, 1.0)
    # P(at least 2) = 1 − P(0) − P(1) of 5 marked among 20, 4 drawn
    assert found.chance == pytest.approx(1 - (1365 + 5 * 455) / 4845)
    assert found.bound == 3
    with pytest.raises(UserError, match="laid over"):
        overlap([], first, 20)


def test_heads_are_forced_to_look() -> None:
    model, ids = small_llama(), prompt(9, batch=2)
    weights = torch.zeros(2, 9)
    weights[0, 2], weights[1, 4], weights[1, 5] = 1.0, 0.5, 0.5
    part = forced(weights, [(1, 0), (3, 2)], layers=6)
    with torch.no_grad(), attach(model, part, record=["weights"]) as session:
        model(ids)
    found = session["weights"]
    for layer, head in ((1, 0), (3, 2)):
        assert torch.allclose(found[layer, :, head, -1], weights.to(found))
    assert not torch.allclose(found[1, :, 1, -1], weights.to(found))
    with pytest.raises(UserError, match="sum to one"):
        forced(weights * 2, [(1, 0)], layers=6)


def test_what_there_is_not_is_refused() -> None:
    subject = Subject(small_llama(), prompts=pairs())
    with pytest.raises(UserError, match="receivers names layer 9"):
        PathPatching(receivers=((9, 0),)).look(subject)
    with pytest.raises(UserError, match="receivers names none"):
        PathPatching(receivers=())
    one = Prompts(pairs().clean[:, :1], pairs().corrupted[:, :1], ANSWERS)
    with pytest.raises(UserError, match="two tokens"):
        PathPatching().look(Subject(small_llama(), prompts=one))


def test_circuit_reuse_overlap_on_smollm2() -> None:
    """benchmarks/circuits.py: what two tasks share. That forcing shared heads helps is not shown: the
    same results hold the accuracies, which speak against it."""
    rows = [r for r in json.loads(RESULTS.read_text())["results"] if r["what"] == "overlap"]
    assert rows
    for row in rows:
        assert row["shared"] > row["bound"]


def test_contract() -> None:
    attlas.check("path-patching")
