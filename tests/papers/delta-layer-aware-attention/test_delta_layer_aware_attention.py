"""DELTA: layers read what the selection layer below them published."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

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
    part = DeltaLayerAware(tokens=6, dense=1, selection_layers=(1, 3), recent=4)
    chosen, read, _ = spied(model, part, ids)
    assert [chosen[i] is None for i in range(6)] == [True, True, False, True, False, False]
    assert torch.equal(chosen[4].index, chosen[5].index)
    assert not torch.equal(chosen[2].index, chosen[4].index)
    assert all(
        torch.equal(c.index[:, :1].expand_as(c.index), c.index) for c in chosen.values() if c
    )
    # Of 41 tokens 32 are packed; 6 of these and the 9 behind them are read, and the list.
    pair, every = 2 * 8 * 2 * 8, 41 * 2 * 8 * 2 * 8
    assert (
        read
        == [every, every * 3 // 2 - 9 * 128, 15 * pair + 48, every * 3 // 2 - 9 * 128]
        + [15 * pair + 48] * 2
    )


def test_published_are_the_most_attended_of_all_heads():
    model, ids = small_llama(), prompt(40)
    part = DeltaLayerAware(tokens=6, dense=0, selection_layers=(0,), recent=8)
    chosen, _, _ = spied(model, part, ids)
    import attlas

    weights = attlas.make("weights")
    with torch.no_grad(), attach(model, record=[weights]):
        model(torch.cat([ids, ids[:, :1]], 1))
    summed = weights.result()[0, 0, :, -1, :32].sum(0)
    assert torch.equal(chosen[1].index[0, 0].long(), summed.topk(6).indices.sort().values)


def test_sliding_layers_are_left_alone():
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=8,
        attn_logit_softcapping=None, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = Gemma2ForCausalLM(config).double().eval(), prompt(40)
    plain = continued(model, ids)
    with attach(model, DeltaLayerAware(1.0, dense=0, selection_layers=(1,), recent=2)):
        torch.testing.assert_close(continued(model, ids), plain)
    with (
        pytest.raises(ValueError, match="layer 2"),
        attach(model, DeltaLayerAware(1.0, dense=0, selection_layers=(2,))),
    ):
        pass


def test_default_layers():
    """A quarter is dense, three layers select, and the layers before the first read everything."""
    part = DeltaLayerAware(0.1)
    assert part.selecting(range(30)) == (7, 14, 22)
    sources = [part.source(i, range(30)) for i in range(30)]
    assert sources == [None] * 8 + [7] * 6 + [None] + [14] * 7 + [None] + [22] * 7


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "keep"),
        ({"keep": 1.5}, "keep"),
        ({"tokens": 7, "page": 4}, "tokens"),
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
