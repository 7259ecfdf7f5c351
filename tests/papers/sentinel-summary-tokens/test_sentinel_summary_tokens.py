"""What the row of sentinel tokens says, sentence by sentence."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import attlas
from attlas.adapt.sentinels import sentinels
from attlas.attach import attach
from attlas.contract.families import find
from attlas.contract.masks import grid_measures
from attlas.contract.parts import prompt, small_llama
from attlas.hf.caches import DynamicCache, StaticCache, with_cache
from attlas.kinds.adapter import Adapter

CHUNK = 5


def injected(model=None):
    adapter = attlas.make("sentinel-summary-tokens", chunk=CHUNK)
    model = small_llama() if model is None else model
    adapter.inject(model)
    with torch.no_grad():
        adapter.rows.row.normal_()
    return adapter, model


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


# The mask equals its brute-force definition -------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_the_mask_equals_its_definition(seed):
    marks = torch.rand(2, 23, generator=torch.Generator().manual_seed(seed)) < [0.1, 0.3, 0.7][seed % 3]
    found = attlas.masks.dense(sentinels(marks), 23, 23)[:, 0]
    for row, marked in enumerate(marks.tolist()):
        for q in range(23):
            begins = max([at + 1 for at in range(q) if marked[at]], default=0)
            wanted = [k <= q and (not marked[q] or k >= begins) for k in range(23)]
            assert found[row, q].tolist() == wanted
    for size in (1, 4, 16):  # what is claimed of blocks of pairs holds
        for told in grid_measures("mask", sentinels(marks), 23, 23, size):
            assert told.error == 0


def test_a_sentinel_stands_behind_every_chunk():
    adapter, _ = injected()
    ids = prompt(13, 2)
    spread = adapter.spread(ids)
    assert adapter.token == 64
    assert (spread == 64).nonzero().tolist() == [[row, at] for row in range(2) for at in (5, 11)]
    assert torch.equal(spread[spread != 64].view(2, 13), ids)
    assert torch.equal(adapter.spread(ids[:, :4]), ids[:, :4])


# In the first layer a sentinel depends on its own chunk only -------------------------------------------


def test_a_sentinel_depends_on_its_chunk_alone_in_the_first_layer():
    adapter, model = injected()
    spread = adapter.spread(prompt(15))
    table = model.get_input_embeddings()(spread).detach().requires_grad_()
    found: dict[str, torch.Tensor] = {}
    handle = model.model.layers[0].register_forward_hook(lambda m, a, out: found.update(out=out))
    model.get_input_embeddings().forward = lambda ids: table
    model(spread, use_cache=False)
    handle.remove()
    found["out"][0, 11].square().sum().backward()  # the sentinel of the second chunk
    moved = table.grad[0].abs().sum(-1) > 0
    assert moved.nonzero()[:, 0].tolist() == list(range(6, 12))


def test_ordinary_tokens_read_all_that_was_before():
    adapter, model = injected()
    spread = adapter.spread(prompt(15))
    with attach(model, record=["weights"]) as session:
        logits(model, spread)
        weights = session["weights"]
    assert weights[:, :, :, 11, :6].abs().max() == 0
    for query in (6, 12, 16):
        assert (weights[:, :, :, query, : query + 1] > 0).all()


def test_texts_without_sentinels_are_the_models_own():
    adapter, model = injected()
    assert torch.equal(logits(model, prompt(13)), logits(small_llama(), prompt(13)))
    assert not torch.allclose(
        logits(model, adapter.spread(prompt(13)))[:, 6:11], logits(model, prompt(13))[:, 5:10]
    )


# Rows, caches, copies ----------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_on_the_left_changes_nothing(attention):
    adapter, model = injected(find("llama").model(attention))
    spread = adapter.spread(prompt(15))[0]
    ids = torch.zeros(2, 22, dtype=torch.long)
    ids[0, 4:], ids[1] = spread, torch.cat([spread, spread[:4]])
    found = logits(model, ids, attention_mask=(ids != 0).long(),
                   position_ids=((ids != 0).cumsum(-1) - 1).clamp(min=0))  # fmt: skip
    torch.testing.assert_close(found[0, 4:], logits(model, spread[None])[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1, :18], found[0, 4:], rtol=1e-4, atol=1e-4)


def test_pieces_steps_and_static_caches_equal_one_pass():
    adapter, model = injected()
    ids = adapter.spread(prompt(22, 2))
    whole = logits(model, ids)
    caches = [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)]
    for cache in caches:
        pieces = [logits(model, p, **with_cache(model, cache)) for p in ids.split([8, 1, 1, 1, 9, 6], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole)


def test_windows_of_the_model_stay():
    adapter, model = injected(find("mistral-window").model())
    ids = adapter.spread(prompt(22, 2))
    whole, cache = logits(model, ids), DynamicCache(config=model.config)
    pieces = [logits(model, p, **with_cache(model, cache)) for p in ids.split([8, 1, 1, 10, 6], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
    with attach(model, record=["weights"]) as session:
        logits(model, ids)
        assert session["weights"][..., 20, :12].abs().max() == 0


def test_a_cropped_cache_goes_on_and_an_unknown_one_is_refused():
    adapter, model = injected()
    ids = adapter.spread(prompt(22))
    whole, cache = logits(model, ids), DynamicCache(config=model.config)
    logits(model, ids[:, :14], **with_cache(model, cache))
    cache.crop(-5)
    torch.testing.assert_close(logits(model, ids[:, 9:], **with_cache(model, cache)), whole[:, 9:])
    copy = deepcopy(cache)
    assert logits(model, prompt(3), **with_cache(model, copy)).isfinite().all()
    with pytest.raises(ValueError, match="read them anew"):
        logits(model, adapter.spread(prompt(5)), **with_cache(model, copy))


def test_generating_goes_on_behind_sentinels():
    adapter, model = injected()
    ids = adapter.spread(prompt(15, 2))
    for ways in ({"do_sample": False}, {"num_beams": 2, "do_sample": False}):
        found = model.generate(ids, max_new_tokens=4, attention_mask=torch.ones_like(ids), **ways)
        assert found.shape == (2, 22)
        assert (found[:, 18:] < 64).all()


# Training ----------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_ordinary_tokens_by_the_ordinary_token_before():
    adapter, model = injected()
    ids = prompt(13, 2)
    found = logits(model, adapter.spread(ids))
    places = [at + at // CHUNK for at in range(12)]
    wanted = cross_entropy(found[:, places].flatten(0, 1), ids[:, 1:].flatten())
    assert adapter.loss(model, ids, 0.0).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_the_row_is_trained_and_saved_with_the_model(tmp_path):
    adapter, model = injected()
    before = adapter.rows.row.detach().clone()
    adam = torch.optim.AdamW(adapter.trainable().values(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = adapter.loss(model, prompt(22, 2), 0.0)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert (adapter.rows.row - before).abs().amin() > 0
    path, other = adapter.save(tmp_path / "tuned.safetensors"), small_llama()
    twin, ids = Adapter.load(path, other), adapter.spread(prompt(22))
    assert torch.equal(logits(other, ids), logits(model, ids))
    twin.injection.undo()
    assert torch.equal(logits(other, prompt(9)), logits(small_llama(), prompt(9)))


def test_the_row_starts_at_the_mean():
    adapter, model = attlas.make("sentinel-summary-tokens"), small_llama()
    adapter.inject(model)
    torch.testing.assert_close(adapter.rows.row, model.get_input_embeddings().weight.mean(0))


def test_what_cannot_work_is_named():
    with pytest.raises(ValueError, match="inject"):
        attlas.make("sentinel-summary-tokens").spread(prompt(5))
    model = small_llama()
    model.set_input_embeddings(type("Scaled", (nn.Embedding,), {})(64, 32))
    with pytest.raises(ValueError, match=r"plain table.*llama is a Scaled"):
        attlas.make("sentinel-summary-tokens").inject(model)
    with pytest.raises(ValueError, match="chunk"):
        attlas.make("sentinel-summary-tokens", chunk=0)
