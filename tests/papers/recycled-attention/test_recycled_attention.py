"""Recycled attention: what is read in which step."""

import pytest
import torch

import attlas
from attlas import attach
from attlas.cache.quantizer import Quantizer
from attlas.contract.parts import prompt, small_llama
from attlas.hf.caches import cache_of, with_cache
from attlas.options import option
from attlas.parts.select.recycled_attention import RecycledAttention
from attlas.storage.layer import StoredLayer
from attlas.storage.packed import PackedBody


class Whole(Quantizer):
    """A quantiser that rounds nothing, so that bodies grow block by block."""

    recent = 2
    block: int = option("tokens encoded together", kw_only=False)

    def encode(self, state, taken):
        return {"whole": Grown(taken.k, taken.v, taken.index, taken.first)}


class Grown(PackedBody):
    kind = ""


def tokens_read(part, model, ids, steps):
    """Pairs of key and value that each head of layer 2 reads in each step."""
    found, attend = [], StoredLayer.attend

    def spy(self, q, **options):
        read = self.segments(1, None, options.get("chosen"))
        found.append([s.index.shape[-1] if hasattr(s, "index") else s.k.shape[2] for s in read])
        return attend(self, q, **options)

    with torch.no_grad(), attach(model, part):
        cache = cache_of(model(ids, use_cache=True))
        for step in range(steps):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(StoredLayer, "attend", spy)
                model(ids[:, step : step + 1], **with_cache(model, cache))
    return [sum(each) for each in found[2::6]]


def test_recycled_attention_reads_k_and_what_came_since():
    """Steps 3, 6 and 9 are full; the others read K and the tokens since, at most K + S."""
    read = tokens_read(RecycledAttention(tokens=5, stride=3), small_llama(), prompt(30), 9)
    assert read == [6, 7, 33, 6, 7, 36, 6, 7, 39]
    assert all(n <= 5 + 3 for i, n in enumerate(read) if i % 3 != 2)


def test_similarity_decides():
    """No query is as similar as 1 to an earlier one, and none less than −1."""
    model, ids = small_llama(), prompt(30)
    assert tokens_read(RecycledAttention(tokens=5, similarity=1.0), model, ids, 3) == [31, 32, 33]
    assert tokens_read(RecycledAttention(tokens=5, similarity=-1.0), model, ids, 3) == [6, 7, 8]


def test_list_is_the_top_of_the_last_full_row():
    """Summed over a group's heads, from attention over everything."""
    model, ids = small_llama(), prompt(30)
    part = RecycledAttention(tokens=5, stride=50)
    with torch.no_grad(), attach(model, part):
        cache = cache_of(model(ids, use_cache=True))
    with torch.no_grad(), attach(model, record=[(weights := attlas.make("weights"))]):
        model(ids)
    last = weights.result()[:, 0, :, -1]
    summed = last.unflatten(1, (2, 2)).sum(2)
    for number, layer in enumerate(cache.layers):
        listed = layer.learned[part.name].tensors["recycled"][0].long()
        assert torch.equal(listed, summed[number].topk(5).indices.sort().values)


def test_tokens_that_a_quantiser_encodes_are_not_lost():
    """When what is chosen from grows, the next step is full: with K everything it stays exact."""
    model, ids = small_llama(), prompt(30, 2)
    ids[0, :7] = 0
    mask = (ids != 0).long()
    given = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    options = {"return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(ids, **given, **options).logits
    with attach(model, Whole(4), RecycledAttention(1.0, stride=50)):
        found = model.generate(ids, **given, **options).logits
    torch.testing.assert_close(torch.stack(found), torch.stack(plain))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "keep"),
        ({"keep": 0.5, "tokens": 4}, "tokens"),
        ({"keep": 0.0}, "keep"),
        ({"tokens": 0}, "tokens"),
        ({"tokens": 4, "stride": 0}, "stride"),
        ({"tokens": 4, "stride": 3, "similarity": 0.5}, "similarity"),
        ({"tokens": 4, "similarity": 1.5}, "similarity"),
    ],
)
def test_refuses(options, named):
    with pytest.raises(ValueError, match=named):
        RecycledAttention(**options)
