"""What `generate` reads in several calls, drafts and takes back leaves nothing behind."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

import attlas
import tiny_models
from attlas.attach import Part, attach
from attlas.attach.part import Recorder
from attlas.cache.part import CachePart
from attlas.catalog import registry
from attlas.catalog.kinds import RECORD
from attlas.contract.families import find
from attlas.errors import UserError
from attlas.hf.caches import cache_of, with_cache


def options_of(entry: registry.Entry) -> dict[str, Any]:
    """Those that must be given."""
    declared = entry.object.declared_options
    return {name: value for name, value in entry.example.items() if declared[name].required}


#: Every recorder that takes tokens back, with its options; the others refuse assisted decoding by name.
RECORDERS = {
    entry.name: options_of(entry) for entry in registry.entries(RECORD)
    if registry.make(entry.name, **options_of(entry)).rewinds
}
#: Parts that deal with a cache, but those that need a calibration.
CACHE = {
    entry.name: entry for entry in registry.entries()
    if isinstance(entry.object, type) and issubclass(entry.object, CachePart)
    and not hasattr(entry.object, "calibration_key")
}  # fmt: skip
LOOKUP = {"prompt_lookup_num_tokens": 4}


def repetitive() -> torch.Tensor:
    return tiny_models.prompt(1, 12).repeat(1, 3)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Transformers' own assistants call `generate` in a way that it tells to be deprecated."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def assistant() -> dict[str, Any]:
    return {"assistant_model": find("llama").model(num_hidden_layers=1)}


def recorders() -> list[Any]:
    """Every recorder there is, which has seen nothing."""
    return [registry.make(name, **options) for name, options in RECORDERS.items()]


def same(a: Any, b: Any) -> None:
    """Records alike; whatever they are made of."""
    if isinstance(a, dict):
        assert set(a) == set(b)
        for name in a:
            same(a[name], b[name])
    else:
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt-neox"])
def test_records_are_those_of_decoding_without_candidates(kind: str) -> None:
    model, ids = tiny_models.decoder(kind), repetitive()
    ways = [LOOKUP, assistant()] if kind == "llama" else [LOOKUP]
    with attach(model, record=recorders()) as session:
        expected = tiny_models.greedy(model, ids, 12)
        wanted = {name: session[name] for name in RECORDERS}
    for way in ways:
        with attach(model, record=recorders()) as session:
            assert tiny_models.greedy(model, ids, 12, **way) == expected
            for name in RECORDERS:
                same(session[name], wanted[name])
        for name in RECORDERS:  # and when the block is left
            same(session[name], wanted[name])


def test_our_own_decoders_too() -> None:
    config = attlas.DecoderConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    model, ids = attlas.Decoder(config).eval(), repetitive()
    with attach(model, record=["entropy"]) as session:
        expected, wanted = tiny_models.greedy(model, ids, 12), session["entropy"]
    with attach(model, attlas.make("snapkv", keep=1.0, window=4), record=["entropy"]) as session:
        assert tiny_models.greedy(model, ids, 12, **LOOKUP) == expected
        same(session["entropy"], wanted)


@pytest.mark.parametrize("name", CACHE)
def test_parts_give_the_tokens_that_they_give_without_candidates(name: str) -> None:
    """Or refuse assisted decoding by its name, before anything is computed."""
    model, ids, calls = find("llama").model(num_hidden_layers=6), repetitive(), []
    part = registry.make(name, **CACHE[name].example)
    with attach(model, part):
        expected = tiny_models.greedy(model, ids, 12)
        for way in (LOOKUP, assistant()):
            if part.rewinds:
                assert tiny_models.greedy(model, ids, 12, **way) == expected
                continue
            handle = model.model.register_forward_pre_hook(lambda *_: calls.append(1))
            with pytest.raises(UserError, match=f"{type(part).__name__}.* assisted decoding"):
                tiny_models.greedy(model, ids, 12, **way)
            handle.remove()
    assert not calls


def test_a_part_goes_along_with_candidates_as_decoded_tokens() -> None:
    """An intervention on prompts leaves what is drafted alone."""
    model, ids = tiny_models.decoder("llama"), repetitive()
    with attach(model, attlas.make("massive-values-disruption", dimensions=4)):
        expected = tiny_models.greedy(model, ids, 12)
        assert tiny_models.greedy(model, ids, 12, **LOOKUP) == expected


def test_a_second_turn_with_candidates() -> None:
    model, ids, question = tiny_models.decoder("llama"), repetitive(), tiny_models.prompt(1, 7, 5)
    if transformers.__version__ == "5.17.0":
        pytest.skip("Transformers 5.17 itself gives other tokens with candidates behind a cache")
    found = []
    for way in ({}, LOOKUP):
        part = attlas.make("snapkv", keep=0.5, window=4)
        with attach(model, part, record=["entropy"]) as session:
            first = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False,
                                   return_dict_in_generate=True, **way)  # fmt: skip
            text = torch.cat([first.sequences, question], dim=1)
            cache = with_cache(model, cache_of(first))
            if way:
                with pytest.raises(UserError, match="the cache holds 41 of the 49 tokens"):
                    tiny_models.greedy(model, text, 6, **way, **cache)
            new = {"attention_mask": torch.ones_like(text)} | cache
            tokens = tiny_models.greedy(model, text[:, 41:], 6, **way, **new)
            found.append((tokens, session["entropy"]))
    assert found[0][0] == found[1][0]
    same(found[0][1], found[1][1])


def test_tokens_that_a_user_takes_back() -> None:
    model, ids, more = tiny_models.decoder("llama"), tiny_models.prompt(), tiny_models.prompt(2, 5, 3)
    names = ["entropy", "weights", "column-sums", "top-links"]
    with torch.no_grad(), attach(model, record=names) as session:
        cache = cache_of(model(ids))
        model(more[:, :2], **with_cache(model, cache))
        wanted = {name: session[name] for name in names}
    with torch.no_grad(), attach(model, record=names) as session:
        cache = cache_of(model(ids))
        model(torch.cat([more[:, :1], more[:, 3:]], dim=1), **with_cache(model, cache))
        cache.crop(-2)
        same(session["entropy"], wanted["entropy"][..., :25])
        model(more[:, 1:2], **with_cache(model, cache))
        for name in names:
            same(session[name], wanted[name])
        cache.crop(-9)
        with pytest.raises(UserError, match=r"ColumnSums .* at most 64"):
            model(more[:, :1], **with_cache(model, cache))


class Counter(Recorder):
    """Says nothing of taking back."""

    def update(self, call, weights, queries, keys) -> None:
        pass

    def result(self) -> int:
        return 0


def test_recorders_that_do_not_say_how_are_refused() -> None:
    model, ids = tiny_models.decoder("llama"), repetitive()
    with attach(model, record=[Counter()]):
        tiny_models.greedy(model, ids)
        with pytest.raises(UserError, match=r"Counter .* assisted decoding"):
            tiny_models.greedy(model, ids, **LOOKUP)
    with attach(model, record=["entropy"]):
        with pytest.raises(UserError, match="assistant_model: it is the attached model itself"):
            tiny_models.greedy(model, ids, assistant_model=model)
        with pytest.raises(UserError, match="assistant_early_exit"):
            tiny_models.greedy(model, ids, assistant_early_exit=1)


def test_rows_that_are_repeated_and_chosen() -> None:
    model, ids, more = tiny_models.decoder("llama"), tiny_models.prompt(), tiny_models.prompt(4, 3, 3)
    names = ["entropy", "column-sums"]
    with torch.no_grad(), attach(model, record=names) as session:
        model(torch.cat([ids.repeat_interleave(2, dim=0), more], dim=1))
        wanted = {name: session[name] for name in names}
    with torch.no_grad(), attach(model, record=names) as session:
        cache = cache_of(model(ids))
        cache.batch_repeat_interleave(2)
        model(more, **with_cache(model, cache))
        for name in names:
            same(session[name], wanted[name])
        cache.batch_select_indices(torch.tensor([0, 2, 3]))
        with pytest.raises(UserError, match="recorded 4 rows and now sees 3"):
            model(more[:3], **with_cache(model, cache))


@pytest.mark.parametrize("name", CACHE)
@pytest.mark.parametrize("size", [1, 6, 23, 24, 100])
def test_chunks_end_where_the_prompt_ends(name: str, size: int) -> None:
    """However a prompt of 24 tokens is cut, what is held of it is the same."""
    if size not in (6, 23) and CACHE[name].object.role != "evict":
        pytest.skip("one kind is enough for every cut")
    model, ids = find("llama").model(num_hidden_layers=6), tiny_models.prompt()
    held = []
    for cut in (None, size):
        part = registry.make(name, **CACHE[name].example)
        with attach(model, part) as session:
            tokens = tiny_models.greedy(model, ids, 4, prefill_chunk_size=cut)
            seen = [layer.original_positions() for layer in session.cache.layers]
            held.append((tokens, session.kv_bytes, seen))
    (_, bytes_whole, whole), (_, bytes_cut, in_chunks) = held
    assert bytes_cut <= bytes_whole * 1.05
    if CACHE[name].object.role == "evict" and CACHE[name].object.exact_prefill:
        assert held[0][0] == held[1][0]
        for a, b in zip(whole, in_chunks, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_a_copy_generates_by_itself_and_nothing_is_left() -> None:
    model, ids = tiny_models.decoder("llama"), repetitive()
    expected = tiny_models.greedy(model, ids)
    with attach(model, attlas.make("snapkv", keep=0.25, window=4)):
        assert "generate" in vars(model)
    assert "generate" not in vars(model)
    own = model.generate = lambda *args, **kwargs: type(model).generate(model, *args, **kwargs)
    with attach(model, Part()):
        assert tiny_models.greedy(model, ids) == expected
    assert model.generate is own
    with attach(copy.deepcopy(model), Part()) as session:
        assert session.model.generate.__self__ is session.model
