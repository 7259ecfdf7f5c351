"""How layers rotate is the model's own doing: unrotated, rotated in pairs, or by the length."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import attlas
import tiny_models
from attlas.attach import attach
from attlas.cache.part import CachePart
from attlas.cache.rotations import look, rotation_of
from attlas.catalog import registry
from attlas.contract import families
from attlas.contract.families import distinct, find
from attlas.errors import UserError
from attlas.hf.caches import cache_of, with_cache

TRAITS = [trait for trait in families.TRAITS if trait.endswith("rotary")]
KINDS = distinct(*TRAITS, "windows", having=["full", "rotary"], lacking=["soft-caps", "sinks"])
#: Parts that rotate, as they change nothing; those of calibrations have tests of their own.
PARTS: dict[str, dict[str, Any]] = {
    "streaming-llm": {"keep": 1.0, "rerotate": True},
    "expected-attention": {"keep": 1.0},
    "longheads": {"page": 4, "length": 16, "begin": 400},
    "actqkv-probe-query": {"tokens": 4096, "page": 2, "sinks": 2},
}


def keys(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return [layer.keys for layer in cache_of(model(ids, position_ids=positions)).layers]


@pytest.mark.parametrize("kind", KINDS)
def test_unrotated_keys_know_no_position(kind: str) -> None:
    """Where a text begins changes rotations alone, so that undone keys are those of any beginning."""
    model, ids = tiny_models.decoder(kind), tiny_models.prompt(1, 7)
    look(model)
    here, there = torch.arange(7)[None], torch.arange(5, 12)[None]
    found = zip(keys(model, ids, here), keys(model, ids, there), strict=True)
    for number, (first, second) in enumerate(found):
        rotation = rotation_of(model, number, "a test")
        if rotation is not None:
            rotary = rotation.now()
            torch.testing.assert_close(rotary.rotate(rotary.unrotate(first, here), there), second,
                                       atol=1e-4, rtol=1e-4)  # fmt: skip
            first, second = rotary.unrotate(first, here), rotary.unrotate(second, there)
        torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    turned = [rotation_of(model, i, "a test") is not None for i in range(4)]
    assert all(turned) == ("some-rotary" not in find(kind).traits)


def test_our_own_decoders_are_asked_too() -> None:
    config = attlas.DecoderConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    model = attlas.Decoder(config).eval()
    rotation = rotation_of(model, 0, "a test")
    assert rotation is not None
    assert rotation.now().inverse.tolist()[0] == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_sinks_move_by_what_the_model_did(kind: str) -> None:
    """The keys that streaming-llm moves are those that the model makes at their new positions."""
    model, ids = tiny_models.decoder(kind), tiny_models.prompt(1, 24)
    moved, stay = (
        attlas.make("streaming-llm", keep=0.5, sinks=4, rerotate=rerotate)
        for rerotate in (True, False)
    )
    found = []
    for part in (moved, stay):
        with torch.no_grad(), attach(model, part):
            found.append(cache_of(model(ids)))
    for number, (after, before) in enumerate(zip(found[0].layers, found[1].layers, strict=True)):
        if type(after).__name__ != "StoredLayer":
            continue
        rotation = rotation_of(model, number, "a test")
        sinks, expected = after.keys[:, :, :4], before.keys[:, :, :4]
        if rotation is not None:
            rotary, old = rotation.now(), torch.arange(4)[None]
            expected = rotary.rotate(rotary.unrotate(expected, old), old + 12)
            assert not torch.allclose(sinks, before.keys[:, :, :4], atol=1e-2)
        torch.testing.assert_close(sinks, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(after.keys[:, :, 4:], before.keys[:, :, 4:])


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_parts_that_rotate_change_nothing_at_full_budget(kind: str, name: str) -> None:
    """Or say on entering that the rotation changes; the model is what it would be without them."""
    model, ids = tiny_models.decoder(kind), tiny_models.prompt(1, 24)
    twin = copy.deepcopy(model)
    expected = tiny_models.greedy(twin, ids)
    part = attlas.make(name, **PARTS[name])
    assert isinstance(part, CachePart)
    if part.one_rotation and "varying-rotary" in find(kind).traits:
        with pytest.raises(UserError, match="changes its frequencies with the length"):
            attach(model, part).__enter__()
        return
    with attach(model, part):
        assert tiny_models.greedy(model, ids) == expected
    for (_, ours), (_, theirs) in zip(model.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(model(ids[:, :5]).logits, twin(ids[:, :5]).logits)


def test_parts_that_rotate_are_all_looked_at() -> None:
    named = {
        entry.name for entry in registry.entries()
        if isinstance(entry.object, type) and issubclass(entry.object, CachePart)
        and (entry.object.rotates or entry.name == "streaming-llm")
    }  # fmt: skip
    assert named - {"eigen-attention"} == set(PARTS)


def test_expected_attention_takes_positions_for_nothing_where_nothing_rotates() -> None:
    model = find("smollm3").model(no_rope_layers=[0, 0, 0, 0])
    ids = tiny_models.prompt(1, 24)
    kept = []
    for first in (0, 300):
        with torch.no_grad(), attach(model, attlas.make("expected-attention", keep=0.5)):
            cache = cache_of(model(ids, position_ids=torch.arange(first, first + 24)[None]))
        kept.append([layer.index for layer in cache.layers])
    assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True))


def test_chunks_keep_the_frequencies_of_their_own_call() -> None:
    """Longrope reads a short first chunk by other frequencies than the whole."""
    model, ids = tiny_models.decoder("phi3-long"), tiny_models.prompt(1, 24)
    part = attlas.make("streaming-llm", tokens=12, sinks=4, rerotate=True)
    with torch.no_grad():
        cache = cache_of(model(ids[:, :8]))
        raw, short = cache.layers[0].keys[:, :, :4], rotation_of(model, 0, "a test").now()
        with attach(model, part, chunked=True):
            cache = cache_of(model(ids[:, :8]))
            model(ids[:, 8:], **with_cache(model, cache))
            model(ids[:, :1], **with_cache(model, cache))
        long = rotation_of(model, 0, "a test").now()
    assert not torch.equal(short.inverse, long.inverse)
    old = torch.arange(4)[None]
    expected = long.rotate(short.unrotate(raw, old), old + 12)
    torch.testing.assert_close(cache.layers[0].keys[:, :, :4], expected, atol=1e-4, rtol=1e-4)


def test_asking_leaves_a_training_model_as_it_is() -> None:
    model = tiny_models.decoder("olmo-dynamic").train()
    model.model.layers[1].eval()
    with torch.no_grad():
        model(tiny_models.prompt(1, 40))  # frequencies have grown
    before = {n: b.clone() for n, b in model.named_buffers()}, [m.training for m in model.modules()]
    state = dict(vars(model.model.rotary_emb))
    look(model)
    after = {n: b.clone() for n, b in model.named_buffers()}, [m.training for m in model.modules()]
    assert before[1] == after[1]
    assert all(torch.equal(before[0][n], after[0][n]) for n in before[0])
    assert vars(model.model.rotary_emb) == state
