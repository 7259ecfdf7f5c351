"""What Quest, Loki and LRQK have in common: padding, chunks, forks, beams, two tiers, all read."""

import pytest
import torch
from transformers import DynamicCache

import tiny_models
from attlas.attach import attach
from attlas.cache.prompt import prefill
from attlas.cache.quantizer import Quantizer
from attlas.calibration import calibrate
from attlas.contract.families import distinct, find
from attlas.errors import UserError
from attlas.hf.caches import with_cache
from attlas.ops.quantize import encode
from attlas.parts.evict.snapkv import SnapKV
from attlas.parts.select.loki import Loki
from attlas.parts.select.lrqk import LRQK
from attlas.parts.select.quest import Quest
from attlas.storage.coded import CodedBody
from attlas.storage.files import load_cache, save_cache

MAKERS = {
    "quest": lambda **kw: Quest(page=4, dense_layers=(0,), **kw),
    "quest-own": lambda **kw: Quest(page=4, dense_layers=(), shared=False, **kw),
    "loki": lambda **kw: Loki(rank=0.5, block=2, **kw),
    "lrqk": lambda **kw: LRQK(rank=4, recent=4, block=2, **kw),
}
every_part = pytest.mark.parametrize("name", MAKERS)


def make(name, model, **options):
    part = MAKERS[name](**options)
    if isinstance(part, Loki):
        part.calibration = calibrate(model, part, [tiny_models.prompt(1, 60, seed=3)])
    return part


def logits_after(model, part, ids, padding="none", length=None, chunked=False, question=None):
    """Logits of fixed later tokens, with the context in one row of a padded batch of two."""
    length, mask = length or ids.shape[1], torch.ones_like(ids)
    later = tiny_models.prompt(1, 9, seed=9)[0].split(1)
    if question is not None:
        later = (question[0], *later)
    if padding != "none":
        gap = torch.full((1, length - ids.shape[1]), 5)
        row, valid = [gap, ids], [torch.zeros_like(gap), mask]
        order = slice(None, None, 1 if padding == "left" else -1)
        other = tiny_models.prompt(1, length, seed=4)
        ids = torch.cat([torch.cat(row[order], dim=1), other])
        mask = torch.cat([torch.cat(valid[order], dim=1), torch.ones_like(other)])
    found, cache = [], DynamicCache(config=model.config)
    parts = part if isinstance(part, tuple) else (part,)
    with torch.no_grad(), attach(model, *parts, chunked=chunked):
        size, positions = 5 if chunked else ids.shape[1], (mask.cumsum(-1) - 1).clamp(min=0)
        for start in range(0, ids.shape[1], size):
            piece = slice(start, start + size)
            model(
                ids[:, piece], **with_cache(model, cache), position_ids=positions[:, piece],
                attention_mask=mask[:, : piece.stop],
            )  # fmt: skip
        for tokens in later:
            mask = torch.cat([mask, mask.new_ones(len(mask), len(tokens))], dim=1)
            out = model(
                tokens.expand(len(mask), -1), **with_cache(model, cache), attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1)[:, -len(tokens) :],
            )  # fmt: skip
            found.append(out.logits[0, -1])
    return torch.stack(found), cache


@pytest.mark.parametrize(
    "kind",
    distinct("rotary", "key-norm", "windows", "sinks", having=["full"], lacking=["soft-caps"]),
)
@every_part
def test_everything_read_is_full_attention(name, kind):
    model, ids = tiny_models.decoder(kind), tiny_models.prompt(2, 27)
    plain = tiny_models.greedy(model, ids, 12)
    with attach(model, make(name, model, keep=1.0)) as session:
        assert tiny_models.greedy(model, ids, 12) == plain
        assert any(getattr(layer, "bodies", None) for layer in session.cache.layers)
    with attach(model, make(name, model, tokens=1000)):
        assert tiny_models.greedy(model, ids, 12) == plain


@pytest.mark.parametrize("kind", distinct("windows", having=["full"]))
@every_part
def test_padding_does_not_count(name, kind):
    model, ids = tiny_models.decoder(kind).double(), tiny_models.prompt(1, 22)
    question = tiny_models.prompt(1, 6, seed=7)
    part = make(name, model, keep=0.4)
    alone, _ = logits_after(model, part, ids, question=question)
    full, _ = logits_after(model, make(name, model, keep=1.0), ids, question=question)
    assert (alone - full).abs().max() > 1e-3  # something was not read
    # Padding on the right stands inside the model's own sliding windows, attlas or not.
    for side in ("left",) if "windows" in find(kind).traits else ("left", "right"):
        padded, _ = logits_after(model, part, ids, side, length=31, question=question)
        torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", ["none", "left"])
@every_part
def test_chunked_prompts_and_forks(name, padding):
    model, ids = tiny_models.decoder("qwen3").double(), tiny_models.prompt(1, 22)
    part = make(name, model, keep=0.4)
    whole, _ = logits_after(model, part, ids, padding, length=32)
    pieces, _ = logits_after(model, part, ids, padding, length=32, chunked=True)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)
    if padding == "none":
        part.check(model)
        cache, found = prefill(model, ids, [part], chunk=9).fork(part), []
        with torch.no_grad(), attach(model, part):
            for token in tiny_models.prompt(1, 9, seed=9)[0].split(1):
                found.append(model(token[None], **with_cache(model, cache)).logits[0, -1])
        torch.testing.assert_close(torch.stack(found), whole, atol=1e-5, rtol=1e-5)


@every_part
def test_beams_and_rows_alone(name):
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    for options in ({}, {"offload": True}):
        with attach(model, make(name, model, keep=0.4, **options)):
            both = tiny_models.greedy(model, ids, 6, attention_mask=mask, num_beams=3)
            first = tiny_models.greedy(model, ids[:1, 9:], 6, num_beams=3)
            second = tiny_models.greedy(model, ids[1:], 6, num_beams=3)
        assert both == first + second


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("padding", ["none", "left"])
@every_part
def test_offloaded_is_the_same_and_moves_what_is_missing(name, padding, dtype):
    model, ids = tiny_models.decoder("llama").to(dtype), tiny_models.prompt(1, 40)
    here, plain = logits_after(model, make(name, model, keep=0.3), ids, padding, length=51)
    there, cache = logits_after(
        model, make(name, model, keep=0.3, offload=True), ids, padding, length=51
    )
    assert torch.equal(here, there)
    tiered = [b for layer in cache.layers for b in layer.bodies.values() if b.kind == "tiered"]
    assert len(tiered) == (3 if name == "quest" else 4)
    for body in tiered:
        assert body.moved == body.misses * 2 * 16 * dtype.itemsize
        assert body.hits
        assert body.misses
    assert sum(x.nbytes for x in cache.layers) < sum(x.nbytes for x in plain.layers)


@every_part
def test_stored_and_read_again(name, tmp_path):
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(1, 30)
    part = make(name, model, keep=0.4, offload=True)
    part.check(model)
    cache = prefill(model, ids, [part]).fork(part)
    save_cache(cache, tmp_path / "cache", model)
    found = []
    for each in (cache, load_cache(tmp_path / "cache", model)):
        with torch.no_grad(), attach(model, part):
            for token in tiny_models.prompt(1, 5, seed=9)[0].split(1):
                found.append(model(token[None], **with_cache(model, each)).logits[0, -1])
    assert torch.equal(torch.stack(found[:5]), torch.stack(found[5:]))


class InBytes(Quantizer):
    """Keys and values in eight bits, by blocks that are no pages."""

    recent, block = 2, 3

    def encode(self, state, taken):
        codes = [encode(x, 8) for x in (taken.k, taken.v)]
        return {"bytes": CodedBody(*codes, taken.index, taken.first)}


@every_part
def test_behind_a_quantiser_and_behind_a_policy(name):
    model, ids = tiny_models.decoder("llama").double(), tiny_models.prompt(1, 26)
    question = tiny_models.prompt(1, 6, seed=7)

    def after(first, part, padding="none"):
        return logits_after(model, (first, part), ids, padding, length=35, question=question)[0]

    for first in (InBytes(), SnapKV(0.7, window=3)):
        alone = logits_after(model, (first,), ids, question=question)[0]
        everything = after(first, make(name, model, keep=1.0))
        torch.testing.assert_close(everything, alone, atol=1e-5, rtol=1e-5)
        some = after(first, make(name, model, keep=0.4))
        assert (some - alone).abs().max() > 1e-3
        padded = after(first, make(name, model, keep=0.4), "left")
        torch.testing.assert_close(padded, some, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="holds them as bytes"):
        after(InBytes(), make(name, model, keep=0.4, offload=True))
    offloaded = after(SnapKV(0.7, window=3), make(name, model, keep=0.4, offload=True))
    torch.testing.assert_close(offloaded, some, atol=1e-9, rtol=1e-9)


def test_wrong_options():
    for part in (Quest, Loki, LRQK):
        with pytest.raises(UserError, match="exactly one of keep"):
            part()
        with pytest.raises(UserError, match="keep and tokens"):
            part(keep=0.5, tokens=8)
        for keep in (0.0, 1.5):
            with pytest.raises(UserError, match="keep must"):
                part(keep=keep)
        with pytest.raises(ValueError, match="tokens"):
            part(tokens=0)
        with pytest.raises(UserError, match="offload=True"):
            part(keep=0.5, capacity=8)
    with pytest.raises(ValueError, match="pages"):
        Quest(pages=0)
    with pytest.raises(ValueError, match="page"):
        Quest(keep=0.5, page=0)
    model = tiny_models.decoder("llama")
    with pytest.raises(UserError, match="layer 7"):
        Quest(keep=0.5, dense_layers=(7,)).check(model)
    for part in (make("loki", model, keep=0.5), LRQK(keep=0.5)):
        part.rank = 17
        with pytest.raises(UserError, match="16 channels"):
            part.check(model)
    for rank in (0.0, 1.5):
        with pytest.raises(UserError, match="rank"):
            Loki(keep=0.5, rank=rank)


def test_a_step_that_reads_more_than_the_device_holds():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(1, 40)
    part = Quest(keep=1.0, page=4, dense_layers=(), offload=True, capacity=12)
    with attach(model, part), pytest.raises(UserError, match="capacity=12"):
        tiny_models.greedy(model, ids)
