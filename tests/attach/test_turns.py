"""A budget over the turns of a chat and through long generation, and for rows of unequal length."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attlas
import tiny_models
from attlas.attach import Part, attach
from attlas.contract.families import find
from attlas.errors import UserError
from attlas.hf.caches import cache_of, with_cache

BUDGET = 12
#: Policies that go on, with a scorer's window where they have one.
POLICIES: dict[str, dict[str, Any]] = {
    "streaming-llm": {"sinks": 2},
    "key-norm-eviction": {"skip_layers": ()},
    "snapkv": {"window": 3},
    "pyramid-kv": {"scorer_options": {"window": 3}, "beta": 2.0},
    "expected-attention": {"sinks": 2, "n_future": 16},
    "tova": {},
    "observed-attention": {"recent": 2},
}


def chat(model: Any, part: Part, turns: list[torch.Tensor], mask: torch.Tensor | None = None) -> Any:
    """(the session, tokens generated, most slots held in each turn, on average over the layers)."""
    ids, cache, held, answers = turns[0][:, :0], None, [], []
    with attach(model, part, while_decoding=True) as session:
        for turn in turns:
            ids = torch.cat([ids, turn], dim=1)
            seen = torch.ones_like(ids)
            if mask is not None:
                seen[:, : mask.shape[1]] = mask
            out = tiny_models.greedy(
                model, ids, 5, attention_mask=seen, **with_cache(model, cache)
            )
            answers.append(out)
            ids = torch.cat([ids, torch.tensor(out)], dim=1)
            cache = session.cache
            slots = [layer.dense_slots for layer in cache.layers]
            held.append(sum(slots) / len(slots))
    return session, answers, held


def turns(batch: int = 2) -> list[torch.Tensor]:
    return list(tiny_models.prompt(batch, 30).split([20, 9, 1], dim=1))


@pytest.mark.parametrize("name", POLICIES)
def test_the_budget_holds_over_turns(name: str) -> None:
    model = find("llama").model(num_hidden_layers=2)
    part = attlas.make(name, tokens=BUDGET, **POLICIES[name])
    session, answers, held = chat(model, part, turns())
    assert max(held) <= BUDGET
    assert session.cache.get_seq_length() == 20 + 9 + 1 + 3 * 5 - 1
    assert not part.while_decoding  # the user's own part is as it was
    alone = [chat(model, part, [turn[row : row + 1] for turn in turns()])[1] for row in (0, 1)]
    assert answers == [a + b for a, b in zip(*alone, strict=True)]


@pytest.mark.parametrize("name", POLICIES)
def test_padding_changes_no_turn(name: str) -> None:
    model = find("llama").model(num_hidden_layers=2)
    part = attlas.make(name, tokens=BUDGET, **POLICIES[name])
    plain = turns(1)
    gap = torch.full((1, 4), 5)
    mask = torch.cat([torch.zeros_like(gap), torch.ones_like(plain[0])], dim=1)
    padded = [torch.cat([gap, plain[0]], dim=1), *plain[1:]]
    assert chat(model, part, padded, mask)[1] == chat(model, part, plain)[1]


@pytest.mark.parametrize("name", ["snapkv", "pyramid-kv"])
def test_a_large_budget_is_the_model(name: str) -> None:
    model = find("llama").model(num_hidden_layers=2)
    part = attlas.make(name, tokens=400, **POLICIES[name])
    whole = attlas.make("quantized-cache", bits=16)
    assert chat(model, part, turns())[1] == chat(model, whole, turns())[1]


def test_snapkv_asks_the_last_queries_of_every_turn() -> None:
    """What is kept after a turn comes of what was kept before it and of the turn, its end for sure."""
    model, ids = find("llama").model(num_hidden_layers=2), tiny_models.prompt(1, 24)
    part = attlas.make("snapkv", tokens=10, window=3, while_decoding=True)
    with torch.no_grad(), attach(model, part):
        cache = cache_of(model(ids[:, :18]))
        first = cache.layers[0].index.clone()
        model(ids[:, 18:], **with_cache(model, cache))
        after = cache.layers[0].dense_positions()
    assert set(after[0, 0].tolist()) <= {*first[0, 0].tolist(), *range(18, 24)}
    assert after[0, :, -3:].tolist() == [[21, 22, 23]] * 2


def test_a_share_grows_with_the_chat() -> None:
    model, part = find("llama").model(num_hidden_layers=2), attlas.make("snapkv", keep=0.25, window=8)
    session, _, held = chat(model, part, [tiny_models.prompt(1, 6), *turns(1)])
    assert held[0] == 8
    assert held[-1] == int(session.cache.get_seq_length() * 0.25)


def test_those_that_go_on_by_themselves_and_those_that_cannot() -> None:
    model = find("llama").model(num_hidden_layers=2)
    for part in (
        attlas.make("quantized-cache", bits=4, recent=4),
        attlas.make("balancekv", keep=0.5, sinks=2, recent=2, block=2),
    ):
        chat(model, part, turns())
    refused = {
        "AdaKV": attlas.make("ada-kv", tokens=BUDGET, scorer_options={"window": 3}),
        "GuiKV": attlas.make("gui-kv", tokens=BUDGET, window=3, images=((2, 8),)),
        "ObservedAttention": attlas.make("pyramid-kv", tokens=BUDGET, scorer="observed-attention"),
    }
    for name, part in refused.items():
        with pytest.raises(UserError, match=f"{name}.* the prompt alone"):
            attach(model, part, while_decoding=True)
    with pytest.raises(UserError, match="there is none"):
        attach(model, record=["entropy"], while_decoding=True)
    small = attlas.make("snapkv", tokens=4, window=8)
    with pytest.raises(UserError, match=r"tokens=4 .* window=8"):
        attach(model, small, while_decoding=True).__enter__()


@pytest.mark.parametrize("name", ["snapkv", "pyramid-kv", "ada-kv", "tova", "streaming-llm"])
def test_a_short_row_keeps_everything(name: str) -> None:
    """Beside a long one it answers as it does alone."""
    model, ids = find("llama").model(num_hidden_layers=2), tiny_models.prompt(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :34] = 0
    options = {"snapkv": {"window": 8}, "streaming-llm": {"sinks": 8}}.get(name, {})
    if name in ("pyramid-kv", "ada-kv"):
        options = {"scorer_options": {"window": 8}}
    part = attlas.make(name, keep=0.5, **options)
    with attach(model, part):
        together = tiny_models.greedy(model, ids, 5, attention_mask=mask)
        assert together[:1] == tiny_models.greedy(model, ids[:1], 5)
        alone = tiny_models.greedy(model, ids[1:, 34:], 5)
    assert together[1:] == alone
    if name != "tova":  # which holds nothing for sure
        assert alone == tiny_models.greedy(model, ids[1:, 34:], 5)
    mask[1, 24:34] = 1
    if name in ("snapkv", "streaming-llm"):
        part = attlas.make(name, keep=0.25, **options)
        with attach(model, part), pytest.raises(UserError, match="4 tokens of the 16 of row 1"):
            tiny_models.greedy(model, ids, 5, attention_mask=mask)
