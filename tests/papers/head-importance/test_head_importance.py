"""What the row of head importance says, sentence by sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import attlas
from attlas.analyses.head_importance import HeadImportance, gate_gradients, least, loss, removed
from attlas.attach import attach
from attlas.contract.families import find
from attlas.contract.parts import prompt, small_llama
from attlas.errors import UserError
from attlas.hf.caches import cache_of, with_cache
from attlas.inspect.runs import logits_with, without
from attlas.inspect.subject import Subject
from attlas.parts.patch.ablate_heads import AblateHeads

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "circuits-cpu.json"


def decoder(**options):
    torch.manual_seed(0)
    config = attlas.DecoderConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, **options,
    )  # fmt: skip
    return attlas.Decoder(config).double().eval()


def test_head_importance_equals_a_finite_difference_of_the_loss_in_the_gate() -> None:
    subject = Subject(decoder(), prompt(12, batch=3))
    found = HeadImportance(normed="no").look(subject).heads["importance"].values
    step, by_difference = 1e-4, torch.zeros_like(found)
    for layer in range(3):
        for head in range(4):
            moved = []
            for scale in (1 + step, 1 - step):
                part = AblateHeads(scale=scale, heads={layer: [head]})
                with torch.no_grad(), attach(subject.model, part, compile=False):
                    moved.append([loss(subject.rows(slice(k, k + 1))) for k in range(3)])
            up, down = (torch.stack(each) for each in moved)
            by_difference[layer, head] = ((up - down) / (2 * step)).abs().mean()
    assert ((found - by_difference).abs() / found).max() < 1e-3


def test_a_batch_has_one_gradient_and_layers_are_normed() -> None:
    subject = Subject(decoder(), prompt(12, batch=3))
    whole = HeadImportance(normed="no", batch_size=3).look(subject).heads["importance"].values
    assert torch.allclose(whole, gate_gradients(subject).abs())
    normed = HeadImportance().look(subject).heads["importance"].values
    assert torch.allclose(normed.norm(dim=1), torch.ones(3, dtype=torch.float64))


def test_the_loss_is_of_labels_or_of_next_tokens_that_are_no_padding() -> None:
    model, ids = small_llama(), prompt(9, batch=2)
    with torch.no_grad():
        logits = model(ids).logits
        expected = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert torch.allclose(loss(Subject(model, ids)), expected)
        padded = torch.cat([ids, torch.zeros_like(ids[:, :2])], dim=1)
        mask = (padded != 0).long()
        assert torch.allclose(loss(Subject(model, padded, mask)), expected, atol=1e-6)
        with pytest.raises(UserError, match="two tokens"):
            loss(Subject(model, ids[:, :1]))
        with pytest.raises(UserError, match="no logits"):
            loss(Subject(model.model, ids))


CHOICES = {
    "whole groups": {0: [0, 1], 2: [2, 3]},
    "one of each group": {1: [0, 2]},
    "uneven": {0: [1], 1: [0, 1, 2], 2: [3]},
    "a whole layer": {1: [0, 1, 2, 3]},
    "nothing": {},
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "ours", "own none"])
def test_head_importance_removed_heads_are_as_masked(name, choice) -> None:
    own = {"ours": {}, "own none": {"position": "none", "attention_bias": True}}
    if name in own:
        model = decoder(**own[name])
    else:
        model = small_llama() if name == "llama" else find(name).model()
    heads = {n: each for n, each in CHOICES[choice].items() if n < model.config.num_hidden_layers}
    ids = prompt(9, batch=2)
    smaller = removed(model, heads)
    masked = logits_with(model, ids, *without(heads))
    with torch.no_grad():
        whole = smaller(ids).logits
        assert torch.allclose(whole, masked, atol=1e-5)
        cache = cache_of(smaller(ids[:, :6], use_cache=True))
        rest = smaller(ids[:, 6:], **with_cache(smaller, cache)).logits
        assert torch.allclose(rest, masked[:, 6:], atol=1e-5)
    sizes = [sum(p.numel() for p in each.parameters()) for each in (smaller, model)]
    assert sizes[0] < sizes[1] if heads else sizes[0] == sizes[1]


def test_projections_shrink_by_what_the_heads_held() -> None:
    model = small_llama()  # 4 query heads over 2 key heads of width 8, 32 wide
    attention = removed(model, {0: [0, 1], 1: [0]}).model.layers[0].self_attn
    assert [tuple(p.weight.shape) for p in (attention.q_proj, attention.k_proj, attention.o_proj)] == [
        (16, 32), (8, 32), (32, 16)
    ]  # fmt: skip
    uneven = removed(model, {1: [0]}).model.layers[1].self_attn
    assert uneven.q_proj.weight.shape == (24, 32)
    assert uneven.k_proj.linear.weight.shape == (16, 32)
    assert uneven.o_proj.weight.shape == (32, 24)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (32, 32)  # the model given stays


def test_what_cannot_be_removed_is_refused() -> None:
    with pytest.raises(UserError, match="heads names"):
        removed(small_llama(), {0: [4]})
    with pytest.raises(UserError, match="layer 9"):
        removed(small_llama(), {9: [0]})
    with pytest.raises(UserError, match="for each head"):
        removed(decoder(position="alibi"), {0: [0]})
    with pytest.raises(UserError, match="count"):
        least(torch.zeros(2, 2), 5)


def test_the_least_heads_go_first() -> None:
    scores = torch.tensor([[0.3, 0.1], [0.2, 0.9]])
    assert least(scores, 3) == {0: [1, 0], 1: [0]}
    assert least(scores, 0) == {}


def test_head_importance_of_smollm2_beats_random_removals() -> None:
    """benchmarks/circuits.py: 54 of 270 heads taken out, in each seed that was run."""
    rows = [r for r in json.loads(RESULTS.read_text())["results"] if r["what"] == "importance"]
    assert rows
    for seed in {r["seed"] for r in rows}:
        losses = {r["removed"]: r["loss"] for r in rows if r["seed"] == seed}
        random = [value for name, value in losses.items() if name.startswith("random")]
        assert len(random) == 5
        assert losses["least, normed layer"] < sum(random) / 5


def test_contract() -> None:
    attlas.check("head-importance")
