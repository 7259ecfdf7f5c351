"""DELTA: layers read what the selection layer below them published."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

import attlas
from attlas import attach
from attlas.contract.parts import continued, prompt, small_llama
from attlas.hf.caches import cache_of, with_cache
from attlas.parts.evict.key_norm import KeyNorm
from attlas.parts.select.delta_layer_aware import DeltaLayerAware
from attlas.storage.layer import StoredLayer


def spied(model, part, ids, steps=1):
    """What was chosen by layer, and the weights' sums over heads of the selection layers' rows."""
    chosen, attend = {}, StoredLayer.attend
    with torch.no_grad(), attach(model, part) as session, pytest.MonkeyPatch.context() as patch:
        cache = cache_of(model(ids, use_cache=True))
        number = {id(layer): i for i, layer in enumerate(cache.layers)}

        def spy(self, q, **options):
            chosen[number[id(self)]] = options.get("chosen")
            return attend(self, q, **options)

        patch.setattr(StoredLayer, "attend", spy)
        for step in range(steps):
            model(ids[:, step : step + 1], **with_cache(model, cache))
        return chosen, [layer.read_bytes for layer in cache.layers], session


def test_delta_layer_aware_attention_layers_read_the_nearest_set_below():
    """Layers 0, 1 and 3 read everything, 2 reads the set of 1, and 4 and 5 that of 3."""
    model, ids = small_llama(), prompt(40)
    part = DeltaLayerAware(tokens=10, page=1, dense=1, selection_layers=(1, 3), recent=4)
    chosen, read, _ = spied(model, part, ids)
    assert [chosen[i] is None for i in range(6)] == [True, True, False, True, False, False]
    assert torch.equal(chosen[4].index, chosen[5].index)
    assert not torch.equal(chosen[2].index, chosen[4].index)
    assert all(
        torch.equal(c.index[:, :1].expand_as(c.index), c.index) for c in chosen.values() if c
    )
    # Of 41 tokens 37 are packed; 6 of these and the 4 behind them are read, and the list.
    pair = 2 * 8 * 2 * 8
    every, again, budget = 41 * pair, 37 * pair // 2, 10 * pair + 6 * 2 * 4
    assert read == [every, every + again, budget, every + again, budget, budget]


@pytest.mark.parametrize("length", [60, 61])
def test_published_are_the_pages_of_the_largest_maxima_over_heads(length):
    """K pages are read: the last two, of which the newest need not be full, and the best others."""
    model, ids = small_llama(), prompt(length)
    with torch.no_grad():  # heads that look broadly, so that a maximum is no sum
        model.model.layers[0].self_attn.q_proj.weight *= 0.2
    part = DeltaLayerAware(tokens=24, page=2, dense=0, selection_layers=(0,), recent=4)
    chosen, read, _ = spied(model, part, ids)
    weights = attlas.make("weights")
    with torch.no_grad(), attach(model, record=[weights]):
        model(torch.cat([ids, ids[:, :1]], 1))
    pages = -(-(length + 1) // 2) - 2
    row = weights.result()[0, 0, :, -1, : 2 * pages].unflatten(-1, (pages, 2))
    best, sums = (x.sum(-1).topk(10).indices.sort().values for x in (row.amax(0), row.sum(0)))
    assert torch.equal(chosen[1].index[0, 0].long(), best)
    assert not torch.equal(best, sums)
    assert read[1] == (20 + length + 1 - 2 * pages) * 2 * 8 * 2 * 8 + 10 * 2 * 4


def test_sliding_layers_are_left_alone():
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=8,
        attn_logit_softcapping=None, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = Gemma2ForCausalLM(config).double().eval(), prompt(40)
    plain = continued(model, ids)
    with attach(model, DeltaLayerAware(1.0, page=1, dense=0, selection_layers=(1,), recent=2)):
        torch.testing.assert_close(continued(model, ids), plain)
    with (
        pytest.raises(ValueError, match="layer 2"),
        attach(model, DeltaLayerAware(1.0, dense=0, selection_layers=(2,))),
    ):
        pass


def test_defaults_are_the_authors():
    """Pages of 16, 64 of them, 8 the newest; of 28 layers two are full and 2, 14 and 22 select."""
    part = DeltaLayerAware()
    assert (part.page, part.recent, part.portion.of(1000)) == (16, 128, 56)
    assert (part.portion.of(60), part.portion.of(56), part.portion.of(40)) == (56, 56, 40)
    assert part.selecting(range(28)) == (2, 14, 22)
    sources = [part.source(i, range(28)) for i in range(28)]
    assert sources == [None] * 3 + [2] * 11 + [None] + [14] * 7 + [None] + [22] * 5


@pytest.mark.parametrize(
    ("layers", "selecting"), [(30, (2, 15, 23)), (6, (1, 3, 4)), (2, (0, 1)), (1, (0,))]
)
def test_the_plan_is_stretched_over_other_models(layers, selecting):
    assert DeltaLayerAware().selecting(range(layers)) == selecting


def test_a_share_counts_the_newest_pages():
    """Of 64 pages a quarter are 16, 8 of them the newest; of 16 they are 4, and one is chosen still."""
    part = DeltaLayerAware(0.25)
    assert (part.portion.of(56), part.portion.of(8)) == (8, 1)
    assert part.portion.of_rows(torch.tensor([[56, 8, 0]])).tolist() == [[8, 1, 0]]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"keep": 0.5, "tokens": 64}, "tokens"),
        ({"keep": 1.5}, "keep"),
        ({"tokens": 7, "page": 4}, "tokens"),
        ({"tokens": 8, "page": 4, "recent": 8}, "recent=8"),
        ({"keep": 0.5, "page": 4, "recent": 6}, "recent"),
        ({"keep": 0.5, "dense": -1}, "dense"),
        ({"keep": 0.5, "selection_layers": ()}, "selection_layers"),
        ({"keep": 0.5, "dense": 2, "selection_layers": (1,)}, "layer 1"),
        ({"keep": 0.5, "selection_layers": (9,)}, "layer 9"),
        ({"keep": 0.5, "dense": 6}, "dense"),
    ],
)
def test_refuses(options, named):
    with pytest.raises(ValueError, match=named), attach(small_llama(), DeltaLayerAware(**options)):
        pass


def test_refuses_to_choose_among_evicted():
    with (
        pytest.raises(ValueError, match="cannot work on one cache"),
        attach(small_llama(), KeyNorm(0.5), DeltaLayerAware(0.5)),
    ):
        pass
