"""PyramidKV shares a budget among layers, Ada-KV among heads, over any policy's scores."""

from fractions import Fraction

import pytest
import torch

import attlas
import tiny_models
from attlas.attach import attach
from attlas.cache.policy import best_slots
from attlas.errors import UserError
from attlas.hf.caches import cache_of, with_cache
from attlas.parts.evict.ada_kv import AdaKV, shared
from attlas.parts.evict.expected_attention import ExpectedAttention
from attlas.parts.evict.pyramid_kv import PyramidKV, pyramid
from attlas.parts.evict.snapkv import SnapKV
from attlas.storage.ragged import RaggedBody

WINDOW = {"window": 3}


def layers_after(model, policy, ids, **options):
    with torch.no_grad(), attach(model, policy):
        return cache_of(model(ids, **options)).layers


def test_pyramids_fall_and_add_up():
    falling = 0
    for mean in (20, 33, 150, 309, 577):
        for tokens, window, beta, layers in (
            (618, 16, 20.0, 30),
            (600, 7, 3.0, 5),
            (999, 1, 8.5, 24),
        ):
            rule = (Fraction(mean), tokens, window, beta)
            budgets = [pyramid(*rule, number, layers) for number in range(layers)]
            assert sum(budgets) == mean * layers
            assert budgets == sorted(budgets, reverse=True)
            assert window <= budgets[-1]
            assert budgets[0] <= tokens
            falling += budgets[0] > budgets[-1]
    assert falling > 10


def test_pyramid_kv_holds_its_steps_in_every_row():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    policy = PyramidKV(0.4, scorer_options=WINDOW, beta=4.0)
    lengths = []
    for number, layer in enumerate(layers_after(model, policy, ids, attention_mask=mask)):
        for row, tokens in enumerate((40, 60)):
            kept = pyramid(Fraction(int(tokens * 0.4)), tokens, 3, 4.0, number, 4)
            assert (layer.original_positions()[row] >= 0).sum(-1).tolist() == [kept, kept]
        lengths.append(layer.dense_slots)
    assert lengths == sorted(set(lengths), reverse=True)


def test_flat_pyramid_is_the_scorer():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 40)
    flat = layers_after(model, PyramidKV(0.5, scorer_options=WINDOW, beta=1.0), ids)
    plain = layers_after(model, SnapKV(0.5, window=3), ids)
    for one, two in zip(flat, plain, strict=True):
        assert torch.equal(one.original_positions(), two.original_positions())


@pytest.mark.parametrize("name", ["pyramid-kv", "ada-kv"])
@pytest.mark.parametrize(
    ("scorer", "options"),
    [
        ("expected-attention", {"n_future": 16}),
        ("key-norm-eviction", {"skip_layers": (0,)}),
        ("observed-attention", {"recent": 4}),
        ("tova", None),
    ],
)
def test_over_any_scorer(name, scorer, options):
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 60)
    policy = attlas.make(name, keep=0.6, scorer=scorer, scorer_options=options)
    held = [(layer.read()[2] >= 0).sum().item() if layer.original_positions() is not None else 240
            for layer in layers_after(model, policy, ids)]  # fmt: skip
    assert sum(held) == pytest.approx(4 * 36 * 4, rel=0.02)
    assert sum(held) <= 4 * 36 * 4


def by_hand(scores, budget, alpha):
    """Ada-KV's choice for one row, by sorting a list."""
    heads, slots = scores.shape
    chosen = set()
    for head in range(heads):
        order = sorted(range(slots), key=lambda s: -scores[head, s].item())
        chosen |= {(head, s) for s in order[: int(alpha * budget)]}
    order = sorted(
        ((h, s) for h in range(heads) for s in range(slots)), key=lambda at: -scores[at].item()
    )
    chosen |= set([at for at in order if at not in chosen][: heads * budget - len(chosen)])
    return chosen


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7, 1.0])
def test_shares_equal_sorting_by_hand(alpha):
    scores = torch.rand(3, 4, 30) * torch.tensor([1.0, 5.0, 0.2, 2.0])[:, None]
    budget = torch.tensor([7, 12, 15])
    valid = torch.ones_like(scores, dtype=torch.bool)
    valid[1, :, :9] = False
    keep = shared(scores, valid, budget, alpha)
    for row, count in enumerate(budget.tolist()):
        lowest = scores[row].masked_fill(~valid[row], -1.0)
        assert set(map(tuple, keep[row].nonzero().tolist())) == by_hand(lowest, count, alpha)
    uniform = torch.zeros_like(keep).scatter(-1, best_slots(scores, valid, budget)[0][..., :7], True)
    if alpha == 1:
        assert torch.equal(keep[0], uniform[0])
    assert scores[0][keep[0]].sum() >= scores[0][uniform[0]].sum()


def test_ada_kv_frees_what_it_drops():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    policy = AdaKV(0.5, scorer_options=WINDOW)
    lengths = []
    for layer in layers_after(model, policy, ids, attention_mask=mask):
        body = layer.bodies["kept"]
        assert isinstance(body, RaggedBody)
        assert layer.dense_slots == 0
        assert body.lengths.sum(-1).tolist() == [2 * 20, 2 * 30]
        slots = 2 * 20 + 2 * 30
        assert body.k.untyped_storage().nbytes() == slots * 16 * 4
        assert layer.nbytes == slots * (2 * 16 * 4 + 4) + 4 * (8 + 4)
        assert (layer.original_positions()[0] != 0).all()  # padding is not kept
        lengths.append(body.lengths)
    assert any(len(set(row.tolist())) > 1 for layer in lengths for row in layer)


def test_ada_kv_reads_what_it_holds():
    """Attention over the ragged body is that over a whole cache with the rest masked, step by step."""
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 30)
    question = tiny_models.prompt(2, 80, seed=5)
    with torch.no_grad(), attach(model, AdaKV(0.5, scorer_options=WINDOW)):
        many = cache_of(model(ids))  # more queries than are read in place
        at_once = model(question, **with_cache(model, many)).logits
        few = cache_of(model(ids))
        steps = [
            model(question[:, t : t + 4], **with_cache(model, few)).logits for t in range(0, 80, 4)
        ]
    torch.testing.assert_close(torch.cat(steps, dim=1), at_once, atol=1e-4, rtol=1e-4)


def test_ada_kv_over_a_pyramid():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(1, 60)
    options = {"scorer_options": WINDOW, "beta": 4.0}
    ada = layers_after(model, AdaKV(0.4, scorer="pyramid-kv", scorer_options=options), ids)
    flat = layers_after(model, PyramidKV(0.4, **options), ids)
    for one, two in zip(ada, flat, strict=True):
        assert one.bodies["kept"].lengths.sum() == 2 * two.dense_slots


def test_refusals():
    for make in (AdaKV, PyramidKV):
        with pytest.raises(UserError, match="AdaKV does more"):
            make(0.5, scorer="ada-kv")
        with pytest.raises(UserError, match="StreamingLLM does more"):
            make(0.5, scorer="streaming-llm")
        with pytest.raises(UserError, match="cache policy"):
            make(0.5, scorer="column-sums")
        with pytest.raises(UserError, match="scorer_options cannot set tokens"):
            make(0.5, scorer_options={"tokens": 3})
        with pytest.raises(ValueError, match="windows"):
            make(0.5, scorer_options={"windows": 3})
    with pytest.raises(UserError, match="PyramidKV does more"):
        PyramidKV(0.5, scorer="pyramid-kv")
    with pytest.raises(UserError, match="alpha"):
        AdaKV(0.5, alpha=1.5)
    with pytest.raises(UserError, match="beta"):
        PyramidKV(0.5, beta=0.5)
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(1, 20)
    with pytest.raises(UserError, match="window=32"), attach(model, PyramidKV(tokens=10)):
        model(ids)


def test_ada_kv_joins_nobody():
    model = tiny_models.decoder("llama")
    second = attlas.make("key-norm-eviction", keep=0.5)
    with pytest.raises(UserError, match="AdaKV"):
        attach(model, AdaKV(0.5), second)
    assert AdaKV.joins == ()
    assert ExpectedAttention.joins


def test_ada_kv_refuses_a_quantiser():
    from attlas.cache.quantizer import Quantizer

    model = tiny_models.decoder("llama")
    with pytest.raises(UserError, match="AdaKV and Quantizer"):
        attach(model, AdaKV(0.5), Quantizer())
