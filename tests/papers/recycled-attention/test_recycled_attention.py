"""Recycled attention: what is read in which step."""

import pytest
import torch

import attlas
from attlas import attach
from attlas.attach import Part
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
        read = self.segments(None, options.get("chosen"))
        found.append([s.index.shape[-1] if hasattr(s, "index") else s.k.shape[2] for s in read])
        return attend(self, q, **options)

    with torch.no_grad(), attach(model, part):
        cache = cache_of(model(ids, use_cache=True))
        for step in range(steps):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(StoredLayer, "attend", spy)
                model(ids[:, step : step + 1], **with_cache(model, cache))
    return [sum(each) for each in found[2::6]]


def test_recycled_attention_reads_k_and_its_own():
    """Steps 3, 6 and 9 are full; the others read the list, which stays at K, and their own token."""
    read = tokens_read(RecycledAttention(tokens=5, stride=3), small_llama(), prompt(30), 9)
    assert read == [6, 6, 33, 6, 6, 36, 6, 6, 39]


def test_a_list_that_is_shorter_than_k_grows_to_it():
    read = tokens_read(RecycledAttention(tokens=6, stride=50), small_llama(), prompt(4), 4)
    assert read == [5, 6, 7, 7]


def test_a_share_is_of_what_is_held():
    read = tokens_read(RecycledAttention(0.5, stride=50), small_llama(), prompt(10), 5)
    assert read == [6, 6, 7, 7, 8]


@pytest.mark.parametrize(
    ("options", "read"),
    [
        ({"similarity": 1.0, "every": 1}, [31, 32, 33, 34, 35, 36]),
        ({"similarity": 1.0, "every": 2}, [6, 32, 6, 34, 6, 36]),
        ({"similarity": 1.0}, [6, 6, 6, 6, 35, 6]),
        ({"similarity": -1.0}, [6, 6, 6, 6, 6, 6]),
        ({"similarity": -1.0, "stride": 4}, [6, 6, 6, 34, 6, 6]),
        ({"similarity": 1.0, "every": 4, "stride": 3}, [6, 6, 33, 6, 6, 36]),
        ({"similarity": 1.0, "every": 2, "stride": 5}, [6, 32, 6, 34, 6, 36]),
    ],
)
def test_similarity_is_looked_at_every_few_steps_beside_a_stride(options, read):
    """No query is as similar as 1 to an earlier one, and none less than −1."""
    part = RecycledAttention(tokens=5, **options)
    assert tokens_read(part, small_llama(), prompt(30), 6) == read


def test_the_least_attended_of_the_list_and_the_new_token_leaves():
    """By the row of the step, over the list and the new token, summed over a group's heads."""
    model, ids = small_llama(), prompt(30)
    part, look = RecycledAttention(tokens=5, stride=50), Queries()
    with torch.no_grad(), attach(model, part, look):
        cache = cache_of(model(ids, use_cache=True))
        layer = cache.layers[2]
        for step in range(4):
            listed = layer.learned[part.name].tensors["recycled"][0]
            model(ids[:, step : step + 1], **with_cache(model, cache))
            keys = layer.bodies["packed"].read()[0][0]
            for head, before in enumerate(listed):
                slots = torch.cat([before, torch.tensor([30 + step])]).long()
                scores = look.q[2][0, 2 * head : 2 * head + 2, 0] @ keys[head, slots].T * 8**-0.5
                gone = scores.softmax(-1).sum(0).argmin()
                left = torch.cat([slots[:gone], slots[gone + 1 :]])
                assert torch.equal(layer.learned[part.name].tensors["recycled"][0, head].long(), left)
    assert layer.dense_slots == 0


def test_a_full_step_makes_the_list_anew():
    model, ids = small_llama(), prompt(30)
    part, look = RecycledAttention(tokens=5, stride=3), Queries()
    with torch.no_grad(), attach(model, part, look):
        cache = cache_of(model(ids, use_cache=True))
        for step in range(3):
            model(ids[:, step : step + 1], **with_cache(model, cache))
    layer = cache.layers[2]
    keys = layer.bodies["packed"].read()[0][0]
    for head, listed in enumerate(layer.learned[part.name].tensors["recycled"][0]):
        scores = look.q[2][0, 2 * head : 2 * head + 2, 0] @ keys[head].T * 8**-0.5
        best = scores.softmax(-1).sum(0).topk(5).indices.sort().values
        assert keys.shape[1] == 33
        assert torch.equal(listed.long(), best)


class Queries(Part):
    """The queries of each layer's last call."""

    def setup(self):
        self.q = {}

    def observe(self, call):
        self.q[call.layer] = call.q


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
        ({"tokens": 4, "similarity": 0.5, "every": 0}, "every"),
        ({"tokens": 4, "similarity": 1.5}, "similarity"),
    ],
)
def test_refuses(options, named):
    with pytest.raises(ValueError, match=named):
        RecycledAttention(**options)
