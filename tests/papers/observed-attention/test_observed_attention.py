"""TOVA and observed attention: what they hold at every step is what a plain simulation holds."""

import pytest
import torch

import tiny_models
from attlas.attach import attach, blocks
from attlas.contract.families import distinct
from attlas.errors import UserError
from attlas.hf.caches import cache_of, with_cache
from attlas.parts.evict import observed_attention
from attlas.parts.evict.observed_attention import ObservedAttention
from attlas.parts.evict.tova import TOVA

PROMPT, STEPS, BUDGET = 20, 6, 8


def one_layer():
    """Where what later tokens ask and show does not rest on what was dropped."""
    model = tiny_models.decoder("llama")
    model.config.num_hidden_layers = 1
    return model


def held(model, policy, ids, mask=None, prompt=PROMPT):
    """Columns held after the prompt and after each later token, [batch, kv_heads, n] each."""
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found, cache = [], None
    with torch.no_grad(), attach(model, policy):
        for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, ids.shape[1]))]:
            cache = cache_of(model(
                ids[:, start:stop], **with_cache(model, cache), attention_mask=mask[:, :stop],
                position_ids=positions[:, start:stop], use_cache=True,
            ))  # fmt: skip
            found.append(cache.layers[0].dense_positions().clone())
    return found


def full_weights(model, ids):
    with torch.no_grad(), attach(model, record=["weights"]) as session:
        model(ids)
    return session["weights"][0, 0]  # [heads, tokens, tokens]


def best_of(scores, kept, always, count):
    """The `count` best of the columns kept, those of `always` before all others."""
    ranked = sorted(kept, key=lambda j: (j in always, scores[j]), reverse=True)
    return sorted(ranked[:count])


def tova(weights):
    """One list of columns for each step."""
    kept, steps = list(range(PROMPT)), []
    for t in range(PROMPT - 1, weights.shape[1]):
        kept = [*kept, t] if t >= PROMPT else kept
        row = weights[:, t, kept]
        mean = (row / row.sum(-1, keepdim=True)).mean(0)
        scores = dict(zip(kept, mean.tolist(), strict=True))
        kept = best_of(scores, kept, {t}, BUDGET)
        steps.append(kept)
    return steps


def heavy_hitters(weights, recent, divide):
    """The same for one key head's group of query heads."""
    sums = weights[:, :PROMPT, :PROMPT].sum(1).mean(0).tolist()
    sums = dict(enumerate(sums))
    kept, steps = list(range(PROMPT)), []
    for t in range(PROMPT - 1, weights.shape[1]):
        if t >= PROMPT:
            kept = [*kept, t]
            row = weights[:, t, kept]
            mean = (row / row.sum(-1, keepdim=True)).mean(0).tolist()
            for j, weight in zip(kept, mean, strict=True):
                sums[j] = sums.get(j, 0.0) + weight
        scores = {j: sums[j] / (t + 1 - j if divide else 1) for j in kept}
        kept = best_of(scores, kept, set(range(t + 1 - recent, t + 1)), BUDGET)
        steps.append(kept)
    return steps


def padded(ids, gap=5):
    """A batch of two with `ids` behind padding, its mask, and the other row."""
    other = tiny_models.prompt(1, ids.shape[1], seed=4)
    row = torch.cat([torch.full((1, gap), 7), ids[:, :-gap]], dim=1)
    mask = torch.ones(2, ids.shape[1], dtype=torch.long)
    mask[0, :gap] = 0
    return torch.cat([row, other]), mask


def test_tova_at_every_step():
    model, ids = one_layer(), tiny_models.prompt(1, PROMPT + STEPS)
    found = held(model, TOVA(tokens=BUDGET, while_decoding=True), ids)
    for step, expected in zip(found, tova(full_weights(model, ids)), strict=True):
        assert step[0].tolist() == [expected] * 2  # all heads alike


@pytest.mark.parametrize(("recent", "divide"), [(0, True), (BUDGET // 2, False), (2, True)])
def test_observed_attention_at_every_step(recent, divide):
    model, ids = one_layer(), tiny_models.prompt(1, PROMPT + STEPS)
    policy = ObservedAttention(tokens=BUDGET, recent=recent, divide=divide, while_decoding=True)
    found, weights = held(model, policy, ids), full_weights(model, ids)
    for head in range(2):
        group = weights[2 * head : 2 * head + 2]
        for step, expected in zip(found, heavy_hitters(group, recent, divide), strict=True):
            assert step[0, head].tolist() == expected


@pytest.mark.parametrize("make", [TOVA, ObservedAttention])
def test_padding_does_not_count_while_decoding(make):
    """A shorter row begins with fewer tokens than the budget: holes, padding and all."""
    model, ids = one_layer(), tiny_models.prompt(1, PROMPT + STEPS)
    gap = 13  # leaves 7 tokens, fewer than the budget
    together, mask = padded(ids, gap)
    found = held(model, make(tokens=BUDGET, while_decoding=True), together, mask)
    policy = make(tokens=BUDGET, while_decoding=True)
    alone = held(model, policy, ids[:, :-gap], prompt=PROMPT - gap)
    other = held(model, make(tokens=BUDGET, while_decoding=True), together[1:])
    for both, one, two in zip(found, alone, other, strict=True):
        row = [[c - gap for c in head if c >= gap] for head in both[0].tolist()]
        assert row == one[0].tolist()
        assert both[1].tolist() == two[0].tolist()


@pytest.mark.parametrize("kind", distinct("soft-caps", "sinks"))
def test_sums_are_those_of_the_weights(kind):
    """Soft caps and sink logits included."""
    model, ids = tiny_models.decoder(kind), tiny_models.prompt(2, 20)
    seen = {}

    class Spy(ObservedAttention):
        def scores(self, state, slots):
            seen[state.layer] = super().scores(state, slots)
            return seen[state.layer]

    with torch.no_grad(), attach(model, Spy(0.5), record=["weights"]) as session:
        model(ids)
    count = 20 - torch.arange(20)
    for layer, scores in seen.items():
        sums = session["weights"][layer].sum(-2).unflatten(1, (2, 2)).mean(2)
        torch.testing.assert_close(scores, sums / count)


def test_blocks_bound_the_memory(monkeypatch):
    model, ids = one_layer(), tiny_models.prompt(1, 2400)
    sizes = []

    def counted(call):
        for weights, *rest in blocks.weight_blocks(call):
            sizes.append(weights.numel())
            yield weights, *rest

    monkeypatch.setattr(observed_attention, "weight_blocks", counted)
    with torch.no_grad(), attach(model, ObservedAttention(0.5)):
        model(ids)
    assert len(sizes) > 1
    assert max(sizes) <= blocks.BLOCK


def test_while_decoding_remembers_what_it_holds_alone():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(1, 24)
    policy = ObservedAttention(tokens=12, while_decoding=True)
    with attach(model, policy) as session:
        tiny_models.greedy(model, ids, 12)
        for layer in session.cache.layers:
            assert layer.learned[policy.name].tensors["sums"].shape == (1, 2, 12)


def test_recent_is_refused_where_it_does_not_fit():
    with pytest.raises(UserError, match="recent"):
        ObservedAttention(0.5, recent=-1)
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(1, 20)
    with (
        pytest.raises(UserError, match="recent=12"),
        attach(model, ObservedAttention(0.5, recent=12)),
    ):
        model(ids)
