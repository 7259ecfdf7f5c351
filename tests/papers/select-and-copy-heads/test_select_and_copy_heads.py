"""What the row of select-and-copy heads says, sentence by sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from attlas.analyses.select_and_copy_heads import OptionScores, SelectAndCopyHeads
from attlas.attach import attach
from attlas.contract.parts import prompt, small_llama
from attlas.hf.caches import cache_of, with_cache
from attlas.inspect.choices import Choices, choices, right_share, spelling

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "heads-smollm2-choice-cpu.json"
PLACES = torch.tensor([3, 6, 9])


def recorded(model, places, *pieces, **given):
    recorder, cache = OptionScores(places), None
    with torch.no_grad(), attach(model, record=[recorder]):
        for piece in pieces:
            more = {} if cache is None else with_cache(model, cache)
            cache = cache_of(model(piece, use_cache=True, **more, **given))
    return recorder.result()


def by_hand(model, ids, places):
    """q·k of the projections' own outputs, and the last row of the weights."""
    seen = {}
    hooks = [
        getattr(block.self_attn, name).register_forward_hook(
            lambda module, args, out, key=(layer, name): seen.__setitem__(key, out.detach())
        )
        for layer, block in enumerate(model.model.layers)
        for name in ("q_proj", "k_proj")
    ]
    with torch.no_grad(), attach(model, record=["weights"]) as session:
        model(ids)
        weights = session["weights"]
    for hook in hooks:
        hook.remove()
    found = []
    for layer in range(6):
        q = seen[layer, "q_proj"].unflatten(-1, (4, 8))[:, -1]
        k = seen[layer, "k_proj"].unflatten(-1, (2, 8))[:, places].repeat_interleave(2, dim=2)
        found.append(torch.einsum("bhd,bohd->bho", q, k))
    return torch.stack(found), weights[:, :, :, -1, places]


def test_select_and_copy_heads_scores_are_those_of_the_projections():
    model, ids = small_llama(), prompt(14, 2)
    found = recorded(model, PLACES, ids)
    qk, weights = by_hand(model, ids, PLACES)
    torch.testing.assert_close(found["qk"].double(), qk, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["attention"].double(), weights.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sizes", [[5, 5, 4], [13, 1]])
def test_select_and_copy_heads_scores_of_pieces(sizes):
    model, ids = small_llama(), prompt(14, 2)
    found, whole = recorded(model, PLACES, *ids.split(sizes, dim=1)), recorded(model, PLACES, ids)
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_select_and_copy_heads_places_are_counted_by_valid_tokens():
    model, ids = small_llama(), prompt(14)
    padded = torch.cat([torch.zeros_like(ids[:, :4]), ids], dim=1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = recorded(model, PLACES, padded, attention_mask=mask, position_ids=positions)
    for name, value in recorded(model, PLACES, ids).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_select_and_copy_heads_each_row_has_its_own_places():
    model, ids = small_llama(), prompt(14, 2)
    places = torch.tensor([[3, 6, 9], [2, 8, 10]])
    found = recorded(model, places, ids)["qk"]
    for row, own in enumerate(places):
        alone = recorded(model, own, ids[row : row + 1])["qk"]
        torch.testing.assert_close(found[:, row : row + 1], alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="behind what has been read"):
        recorded(model, torch.tensor([3, 40]), ids)


def planted():
    """A model whose head 1 of layer 0 looks from anywhere at the tokens 40 to 49."""
    model = small_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0  # every token; none but the chosen have channel 1
        model.model.embed_tokens.weight[:, 1] = -1.0
        model.model.embed_tokens.weight[40:50, 1] = 1.0
        attention = model.model.layers[0].self_attn
        attention.q_proj.weight[8:16] = 0.0
        attention.q_proj.weight[15, 0] = 20.0  # the last channels are rotated least
        attention.k_proj.weight[:8] = 0.0
        attention.k_proj.weight[7, 1] = 20.0
    return model


def multiple_choice(count):
    """Prompts with one of the tokens 40 to 49 among three others of 20 to 39; letters are 10 to 12."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50, 64, (count, 12), generator=generator)
    right = torch.randint(0, 3, (count,), generator=generator)
    ids[:, PLACES] = torch.randint(20, 40, (count, 3), generator=generator)
    ids[torch.arange(count), PLACES[right]] = torch.randint(40, 50, (count,), generator=generator)
    ids[:, -1] = 5
    return Choices(ids, PLACES.expand(count, -1), torch.tensor([10, 11, 12]), right)


def test_select_and_copy_heads_planted_head_is_right_where_the_letters_are_not():
    asked = multiple_choice(60)
    scores, said = SelectAndCopyHeads().scores(planted(), asked)
    for name in ("qk", "attention"):
        assert right_share(scores[name], asked.right)[0, 1] == 1.0
    assert right_share(said, asked.right) < 0.6


def test_select_and_copy_heads_options_end_with_the_last_marks():
    ids = torch.tensor([[3, 8, 10, 3, 11, 3, 12, 3, 5], [8, 10, 3, 11, 9, 3, 12, 3, 5]])
    found = choices(ids, torch.tensor([12, 10]), (10, 11, 12), 3)
    assert found.ends.tolist() == [[3, 5, 7], [2, 5, 7]]
    assert found.right.tolist() == [2, 0]
    with pytest.raises(ValueError, match="not all among the letters"):
        choices(ids, torch.tensor([12, 7]), (10, 11, 12), 3)
    with pytest.raises(ValueError, match="fewer than 3 tokens 9"):
        choices(ids, torch.tensor([12, 10]), (10, 11, 12), 9)
    with pytest.raises(ValueError, match="tokenizer"):
        spelling(None, None, 3, "this")


def test_select_and_copy_heads_of_smollm2_beat_the_letters():
    """By ten points at least, on the half of the prompts on which they were not chosen."""
    rows = json.loads(RESULTS.read_text())["results"]
    for seed in {row["seed"] for row in rows}:
        right = {row["chosen by"]: row["right"] for row in rows if row["seed"] == seed}
        assert right["QK-score"] >= right["letters"] + 0.1
        assert right["weights"] >= right["letters"] + 0.1
