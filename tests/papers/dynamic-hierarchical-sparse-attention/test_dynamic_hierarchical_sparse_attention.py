"""dynamic-hierarchical-sparse-attention: chunks of unequal length say which tokens a query reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attlas
from attlas import masks
from attlas.attach import attach
from attlas.attach.thinned import Text
from attlas.cache.boundaries import WINDOW, Boundaries, ratios, trained, windows
from attlas.calibration import calibrate
from attlas.contract.parts import prompt, small_llama
from attlas.hf.caches import DynamicCache, with_cache
from attlas.parts.select.dynamic_hierarchical import DynamicHierarchical, peaks, pooled


def part(**options: object) -> DynamicHierarchical:
    given = {"budget": 8, "first": 0, "recent": 0, "dense": 0, **options}
    return DynamicHierarchical(**given)


def text(heads: int = 1, kv_heads: int = 1, queries: int = 40, keys: int = 40, batch: int = 1) -> Text:
    q = torch.randn(batch, heads, queries, 16, dtype=torch.float64)
    k, v = torch.randn(2, batch, kv_heads, keys, 16, dtype=torch.float64)
    return Text(0, q, k, v, 0.25)


def ends_at(keys: int, *stops: int) -> Tensor:
    ends = torch.zeros(1, keys, dtype=torch.bool)
    ends[0, [stop - 1 for stop in (*stops, keys)]] = True
    return ends


def seen(mask: masks.Mask, given: Text) -> Tensor:
    whole = masks.dense(mask & masks.causal, given.q.shape[2], given.k.shape[2])
    return whole.expand(len(given.q), -1, -1, -1)[:, 0]


def by_hand(given: Text, stops: list[int], budget: int, first: int, recent: int) -> Tensor:
    """What each query reads, token by token, of a text that is read as a whole."""
    keys = given.k.shape[2]
    q, k = given.q[0].mean(0), given.k[0].mean(0)
    chunk = [sum(t >= stop for stop in stops) for t in range(keys)]
    members = [[t for t in range(keys) if chunk[t] == c] for c in range(len(stops) + 1)]
    wide = [(q[m].mean(0) * len(m) ** 0.5, k[m].mean(0) * len(m) ** 0.5) for m in members]
    read = torch.zeros(keys, keys, dtype=torch.bool)
    for t in range(keys):
        always = {j for j in range(t + 1) if j < first or t - j < recent}
        rest = [j for j in range(t + 1) if j not in always]
        rest.sort(key=lambda j: (-(wide[chunk[t]][0] @ wide[chunk[j]][1]).item(), j))
        read[t, [*always, *rest[: budget - len(always)]]] = True
    return read


@pytest.mark.parametrize(("budget", "first", "recent"), [(8, 0, 0), (12, 2, 3), (5, 0, 5), (60, 1, 1)])
def test_dynamic_hierarchical_sparse_attention_reads_what_its_definition_says(
    budget: int, first: int, recent: int
) -> None:
    stops, given = [3, 4, 15, 22, 31], text(heads=4, kv_heads=2)
    mask = part(budget=budget, first=first, recent=recent).read(given, ends_at(40, *stops))
    assert torch.equal(seen(mask, given)[0], by_hand(given, stops, budget, first, recent))


def test_dynamic_hierarchical_sparse_attention_of_single_tokens_is_top_k() -> None:
    given = text()
    read = seen(part(budget=7).read(given, torch.ones(1, 40, dtype=torch.bool)), given)[0]
    scores = (given.q @ given.k.mT)[0, 0].masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
    best = torch.zeros(40, 40, dtype=torch.bool).scatter(1, scores.topk(7).indices, True)
    assert torch.equal(read, best & (scores > -torch.inf))


def test_dynamic_hierarchical_sparse_attention_lists_hold_what_is_read() -> None:
    """Of a long text, over lists of blocks and pair by pair; with pieces, several rows, and the tail."""
    given = text(heads=2, queries=200, keys=300, batch=2)
    ends = torch.rand(2, 300) < 0.1
    ends[:, -1] = True
    chosen = part(budget=50, first=5, recent=9, dense=70).read(given, ends)
    pages, inside = chosen.left, chosen.right
    assert isinstance(pages, masks.Pages)
    wanted = masks.dense(inside & masks.causal, 200, 300)
    assert torch.equal(masks.dense(chosen & masks.causal, 200, 300), wanted.expand(2, -1, -1, -1))
    listed = masks.dense(pages, 200, 300)
    assert listed.float().mean() < 0.9  # nor does it hold everything
    count = wanted.sum(-1)[:, 0]
    assert (count[:, :130] == 50).all()  # the budget of every query that is not dense
    assert torch.equal(count[0, 130:], torch.arange(231, 301))


def test_dynamic_hierarchical_sparse_attention_keeping_everything_is_exact() -> None:
    model, ids = small_llama(), prompt(60, batch=2)
    valid = torch.ones_like(ids)
    valid[0, :9] = 0
    thin = attlas.make("dhsa", budget=10**6, dense=0)
    thin.calibration = calibrate(model, thin, [prompt(96, seed=2)])
    plain = model(ids, attention_mask=valid).logits
    with attach(model, thin):
        ours = model(ids, attention_mask=valid).logits
    torch.testing.assert_close(ours[valid > 0], plain[valid > 0])


def test_dynamic_hierarchical_sparse_attention_is_causal_and_leaves_decoding_exact() -> None:
    model, ids = small_llama(), prompt(60)
    thin = attlas.make("dhsa", budget=12, first=1, recent=4, dense=0, block=8, threshold=-9.0)
    thin.calibration = calibrate(model, thin, [prompt(96, seed=2)])
    with attach(model, thin):
        cache = DynamicCache()
        ours = model(ids, **with_cache(model, cache))
        kept = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        step = model(ids[:, -1:], **with_cache(model, cache)).logits
    assert all(0 < share.max() <= 1 for share in thin.density.values())
    plain = DynamicCache()
    for number, (k, v) in enumerate(kept):
        plain.update(k, v, number)
    torch.testing.assert_close(model(ids[:, -1:], **with_cache(model, plain)).logits, step)
    assert not torch.allclose(ours.logits, model(ids).logits)


def test_dynamic_hierarchical_sparse_attention_root_frees_scores_of_the_length() -> None:
    """Of unrelated tokens the scores of chunks are as wide, whatever their lengths; those of means
    shrink, those of sums grow."""
    torch.manual_seed(0)
    lengths = torch.randint(1, 64, (400,))
    stops = lengths.cumsum(0)
    starts = stops - lengths
    k = torch.randn(int(stops[-1]), 64, dtype=torch.float64)
    query = torch.randn(64, dtype=torch.float64)
    scores = (pooled(k, starts, stops) @ query).abs()

    def correlation(x: Tensor, y: Tensor) -> float:
        return torch.corrcoef(torch.stack((x, y)))[0, 1].item()

    size = lengths.double()
    assert abs(correlation(scores, size)) < 0.1
    assert correlation(scores / size.sqrt(), size) < -0.3
    assert correlation(scores * size.sqrt(), size) > 0.3


@pytest.mark.parametrize("apart", [0, 1, 5])
def test_dynamic_hierarchical_sparse_attention_boundaries_keep_apart(apart: int) -> None:
    logits = torch.randn(200).masked_fill(torch.rand(200) < 0.3, -torch.inf)
    logits[50:60] = 2.0
    taken: list[int] = []
    for at in logits.argsort(descending=True, stable=True).tolist():
        if logits[at] > -torch.inf and all(abs(at - other) > apart for other in taken):
            taken.append(at)
    assert peaks(logits, apart).nonzero()[:, 0].tolist() == sorted(taken)


def test_dynamic_hierarchical_sparse_attention_windows_end_at_their_positions() -> None:
    flat = torch.arange(1.0, 11)[:, None]
    found = windows(flat, torch.tensor([0, 5, 9]))[..., 0]
    assert found.tolist() == [
        [0, 0, 0, 1, 2, 3, 4, 5], [3, 4, 5, 6, 7, 8, 9, 10], [7, 8, 9, 10, 0, 0, 0, 0],
    ]  # fmt: skip


def test_dynamic_hierarchical_sparse_attention_ratios_are_those_of_later_queries() -> None:
    weights = torch.rand(40, 40, dtype=torch.float64).tril()
    found, w = ratios(weights), WINDOW
    assert len(found) == 40 - 4 * w + 1
    for place, ratio in enumerate(found.tolist()):
        i = place + 2 * w - 1
        past = weights[i + w :, i - w + 1 : i + 1].sum().item()
        following = weights[i + w :, i + 1 : i + w + 1].sum().item()
        wanted = (max(past, following) + 1e-6) / (min(past, following) + 1e-6)
        assert ratio == pytest.approx(wanted)


def test_dynamic_hierarchical_sparse_attention_learns_boundaries() -> None:
    """Where keys change their direction, which is told apart on texts that were not trained on."""

    def drawn(count: int) -> tuple[Tensor, Tensor]:
        sides = torch.randn(count, 2, 1, 24)
        turns = torch.rand(count) < 0.3
        sides[~turns, 1] = sides[~turns, 0]
        noise = 0.3 * torch.randn(count, 2, WINDOW, 24)
        return (sides + noise).flatten(1, 2), turns

    torch.manual_seed(0)
    state = trained(*drawn(4000))
    model = Boundaries(24)
    model.load_state_dict(state)
    both, turns = drawn(1000)
    with torch.no_grad():
        right = ((model(both) > 0) == turns).float().mean()
    assert right > 0.95


def test_dynamic_hierarchical_sparse_attention_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="budget"):
        DynamicHierarchical(budget=1.5)
    with pytest.raises(ValueError, match="budget=100"):
        DynamicHierarchical(budget=100)
    with pytest.raises(ValueError, match="calibrate"), attach(small_llama(), DynamicHierarchical()):
        pass
    with pytest.raises(ValueError, match="texts"):
        calibrate(small_llama(), part(), [prompt(15)])
