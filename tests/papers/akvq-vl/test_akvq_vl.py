"""AKVQ-VL: what is rotated, who keeps how many bits, and where pivots are looked for."""

import pytest
import torch
from torch import nn

import attlas
from attlas import attach
from attlas.attach import Part
from attlas.cache.prompt import prefill
from attlas.contract.parts import prompt, small_llama
from attlas.errors import UserError
from attlas.hf.caches import cache_of, with_cache
from attlas.storage.changed import rotated
from attlas.storage.layer import LayerState, StoredLayer, Taken

SMALL = {"block": 8, "recent": 4, "pivots": 3, "early_layers": 1}


def made(**options):
    return attlas.make("akvq-vl", **{**SMALL, **options})


class Residual(Part):
    """The largest activation of each token of what enters each block."""

    points = ("residual",)

    def setup(self):
        self.largest = {}

    def stream(self, site, x):
        self.largest[site.layer] = x.abs().amax(-1)


def held(layer):
    """Columns by name of the body, of the first row and head."""
    found = {name: body.index[0, 0] for name, body in layer.bodies.items()}
    return {name: index[index >= 0].tolist() for name, index in found.items()}


@pytest.mark.parametrize("dim", [8, 64, 96])
def test_akvq_vl_rotation_changes_no_attention_and_spreads_outliers(dim):
    q, k, v = torch.randn(3, 1, 2, 50, dim)
    k[..., 3] *= 20
    plain = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    after = nn.functional.scaled_dot_product_attention(
        rotated(q), rotated(k), rotated(v), is_causal=True
    )
    assert torch.allclose(rotated(after), plain, atol=1e-5)
    assert rotated(k).abs().amax() / rotated(k).std() < k.abs().amax() / k.std()


def test_defaults_are_the_papers():
    part = attlas.make("akvq-vl")
    found = (part.bits, part.salient_bits, part.pivots, part.recent, part.clip, part.channel_group)
    assert found == (2, 4, 15, 128, 0.8, 128)


@pytest.mark.parametrize("chunk", [None, 7])
def test_pivots_are_the_tokens_of_the_largest_activations_of_the_residual_stream(chunk):
    """In all layers but the early ones; the newest stay as they are, and the rest has two bits."""
    model, ids = small_llama(), prompt(44)
    with torch.no_grad(), attach(model, look := Residual()):
        model(ids)
    part = made(images=[(10, 30)])
    layers = prefill(model, ids, [part], chunk=chunk).fork(part).layers
    assert held(layers[0]) == {"rest": [*range(10, 30)], "text": [*range(10), *range(30, 40)]}
    for number, layer in enumerate(layers[1:], 1):
        top = set(look.largest[number][0].topk(3).indices.tolist())
        columns = held(layer)
        assert columns["pivots"] == sorted(top & set(range(40)))
        assert columns["rest"] == sorted(set(range(40)) - top)
        assert layer.dense_slots == 4
        assert layer.bodies["rest"].k.bits == layer.bodies["rest"].v.bits == 2
        exact = layer.bodies["pivots"].read()[0]
        assert exact.dtype == layer.keys.dtype
    assert layers[0].bodies["text"].k.bits == 4


def test_pivots_are_found_once():
    """What comes later takes no place of theirs, and what was new when they were found keeps it."""
    model, ids = small_llama(), prompt(20)
    with torch.no_grad(), attach(model, part := made()):
        cache = cache_of(model(ids, use_cache=True))
        tensors = cache.layers[2].learned[part.name].tensors
        first = tensors["pivots"]
        assert "largest" not in tensors
        for step in range(20):
            model(ids[:, step : step + 1], **with_cache(model, cache))
        assert torch.equal(cache.layers[2].learned[part.name].tensors["pivots"], first)
    assert held(cache.layers[2])["pivots"] == sorted(first[0].tolist())


def test_a_row_finds_its_pivots_when_it_has_a_block_to_encode():
    """A short row beside a long one waits, as it would alone."""
    model, ids = small_llama(), prompt(20, 2)
    mask = torch.ones_like(ids)
    mask[0, :12] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), attach(model, part := made()):
        cache = cache_of(model(ids, attention_mask=mask, position_ids=positions, use_cache=True))
        tensors = cache.layers[2].learned[part.name].tensors
        assert tensors["begun"].tolist() == [False, True]
        for step in range(5):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            model(
                ids[:, step : step + 1], attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1, **with_cache(model, cache),
            )  # fmt: skip
        together = cache.layers[2].learned[part.name].tensors["pivots"][0] - 12
    with torch.no_grad(), attach(model, part := made()):
        cache = cache_of(model(ids[:1, 12:], use_cache=True))
        for step in range(5):
            model(ids[:1, step : step + 1], **with_cache(model, cache))
        assert torch.equal(together, cache.layers[2].learned[part.name].tensors["pivots"][0])


def test_two_bits_span_the_middle_of_the_range_and_four_all_of_it():
    state, x = LayerState(2, (0, 1, 2)), torch.randn(1, 2, 8, 16)
    for bits, clip in ((2, 0.8), (4, 1.0)):
        body = made(salient_bits=4).coded(state, Taken(x, x, None, 0), bits)
        turned = rotated(x)
        spans = turned.amax(-1) - turned.amin(-1)
        coded = body.k.read()
        torch.testing.assert_close(coded.amax(-1) - coded.amin(-1), clip * spans, rtol=5e-3, atol=0)


def test_steps_are_of_groups_of_channels():
    state, x = LayerState(2, (0, 1, 2)), torch.randn(1, 2, 8, 16)
    steps = {
        group: made(channel_group=group).coded(state, Taken(x, x, None, 0), 2).k.step.shape[-1]
        for group in (4, 16, 128)
    }
    assert steps == {4: 4, 16: 1, 128: 1}


def test_what_enters_a_block_must_be_seen():
    part, layer = made(), StoredLayer()
    with pytest.raises(UserError, match="early_layers"):
        part.learn(LayerState(2, (0, 1, 2)), _call(layer))


def _call(layer):
    from attlas.attach import Call, ForwardPass

    q = torch.randn(1, 2, 4, 8)
    return Call(2, nn.Identity(), q, q, q, 1.0, None, ForwardPass(length=4), is_causal=True)
