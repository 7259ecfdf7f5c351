"""What all selections of this family promise, whatever they choose by."""

import pytest
import torch

from attlas import attach
from attlas.cache.prompt import prefill
from attlas.contract.parts import continued, prompt, small_llama
from attlas.hf.caches import cache_of, with_cache
from attlas.parts.select.actqkv import ActQKV
from attlas.parts.select.adaptive_long_context import AdaptiveLongContext
from attlas.parts.select.delta_layer_aware import DeltaLayerAware
from attlas.parts.select.longheads import LongHeads
from attlas.parts.select.recycled_attention import RecycledAttention
from attlas.storage.files import load_cache, save_cache

PARTS = {
    "recycled": lambda: RecycledAttention(tokens=6, stride=3),
    "recycled-share": lambda: RecycledAttention(0.4, stride=4),
    "recycled-similar": lambda: RecycledAttention(tokens=6, similarity=0.3, every=1),
    "recycled-both": lambda: RecycledAttention(tokens=6, similarity=0.3, every=2, stride=3),
    "delta": lambda: DeltaLayerAware(
        tokens=6, page=2, dense=1, selection_layers=(1, 3), recent=2
    ),
    "delta-share": lambda: DeltaLayerAware(0.3, dense=0, selection_layers=(0, 3), recent=0, page=4),
    "adaptive": lambda: AdaptiveLongContext(0.8, sinks=4, recent=4, page=4),
    "longheads": lambda: LongHeads(4, 12),
    "longheads-late": lambda: LongHeads(2, 8, begin=20, attend_self=False),
    "actqkv": lambda: ActQKV(tokens=4, page=2, window=4, sinks=2, recent=4, horizon=2),
    "actqkv-share": lambda: ActQKV(0.4, page=4, window=None, sinks=0, recent=3),
    "adaptive-no-sinks": lambda: AdaptiveLongContext(0.5, sinks=0, recent=2, page=2),
}  # fmt: skip
WHOLE = {
    "recycled-keep": lambda: RecycledAttention(1.0, stride=3),
    "recycled-tokens": lambda: RecycledAttention(tokens=500, stride=3),
    "recycled-stride": lambda: RecycledAttention(tokens=2, stride=1),
    "recycled-similar": lambda: RecycledAttention(1.0, similarity=-1.0),
    "delta-keep": lambda: DeltaLayerAware(1.0, page=2, dense=1, selection_layers=(2, 4), recent=2),
    "delta-tokens": lambda: DeltaLayerAware(tokens=512, dense=1, recent=0),
    "adaptive": lambda: AdaptiveLongContext(1.0, sinks=4, recent=2, page=2),
    "longheads": lambda: LongHeads(4, 64, begin=4),
    "actqkv-keep": lambda: ActQKV(1.0, page=2, window=5, sinks=2, recent=3, horizon=1),
    "actqkv-tokens": lambda: ActQKV(tokens=400, page=4, window=7, sinks=4, recent=3),
}
#: Their prompt is the model's own.
EXACT = [name for name, make in PARTS.items() if make().exact_prefill]


@pytest.fixture(scope="module")
def llama():
    return small_llama()


@pytest.fixture(scope="module")
def plain(llama):
    return continued(llama, prompt(41, 2))


def steps(model, part, ids, mask=None, *, chunk=None, given=None):
    """Logits of six fixed tokens, each row's valid tokens at their own positions."""
    batch, length = ids.shape
    mask = torch.ones_like(ids) if mask is None else mask
    given = torch.arange(6 * batch).reshape(6, batch) % 40 + 3 if given is None else given
    found = []
    with torch.no_grad(), attach(model, part, chunked=chunk is not None):
        cache = None
        for start in range(0, length, chunk or length):
            stop = min(start + (chunk or length), length)
            positions = (mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, start:]
            cache = cache_of(model(
                ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions,
                **with_cache(model, cache), use_cache=True,
            ))  # fmt: skip
        for tokens in given:
            mask = torch.cat([mask, mask.new_ones(batch, 1)], 1)
            out = model(
                tokens[:, None], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
                **with_cache(model, cache),
            )  # fmt: skip
            found.append(out.logits[:, -1])
    return torch.stack(found)


@pytest.mark.parametrize("name", WHOLE)
def test_everything_is_full_attention(llama, plain, name):
    with attach(llama, WHOLE[name]()):
        torch.testing.assert_close(continued(llama, prompt(41, 2)), plain)


@pytest.mark.parametrize("name", PARTS)
def test_less_is_not(llama, plain, name):
    with attach(llama, PARTS[name]()):
        assert (continued(llama, prompt(41, 2)) - plain).abs().max() > 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PARTS)
def test_padding(llama, name, side):
    ids = prompt(41, 2)
    given = torch.arange(12).reshape(6, 2) + 3
    mask = torch.ones_like(ids)
    hidden = slice(0, 11) if side == "left" else slice(30, 41)
    alone_ids = ids[:1, 11:] if side == "left" else ids[:1, :30]
    ids[0, hidden], mask[0, hidden] = 0, 0
    together = steps(llama, PARTS[name](), ids, mask, given=given)
    alone = steps(llama, PARTS[name](), alone_ids, given=given[:, :1])
    torch.testing.assert_close(together[:, :1], alone)
    other = steps(llama, PARTS[name](), ids[1:], given=given[:, 1:])
    torch.testing.assert_close(together[:, 1:], other)


@pytest.mark.parametrize("name", PARTS)
def test_chunked_prompts(llama, name):
    ids = prompt(40, 2)
    whole = steps(llama, PARTS[name](), ids)
    torch.testing.assert_close(steps(llama, PARTS[name](), ids, chunk=16), whole)


@pytest.mark.parametrize("name", EXACT)
def test_forks(llama, name):
    ids = prompt(40, 2)
    whole = steps(llama, PARTS[name](), ids)
    part = PARTS[name]()
    read = prefill(llama, ids, [part])
    for _ in range(2):  # a fork leaves the prompt as it was
        with torch.no_grad(), attach(llama, part):
            cache = read.fork(part)
            for tokens, logits in zip(torch.arange(12).reshape(6, 2) % 40 + 3, whole, strict=True):
                out = llama(tokens[:, None], **with_cache(llama, cache)).logits[:, -1]
                torch.testing.assert_close(out, logits)


@pytest.mark.parametrize("name", PARTS)
def test_beams_follow_their_rows(llama, name):
    """Rows put in another order go on as they would have."""
    ids, given = prompt(40, 2), torch.arange(12).reshape(6, 2) + 3
    straight = steps(llama, PARTS[name](), ids, given=given)
    with torch.no_grad(), attach(llama, PARTS[name]()):
        cache = cache_of(llama(ids, use_cache=True))
        for tokens in given[:4]:
            llama(tokens[:, None], **with_cache(llama, cache))
        cache.reorder_cache(torch.tensor([1, 0]))
        for tokens, logits in zip(given[4:].flip(1), straight[4:].flip(1), strict=True):
            out = llama(tokens[:, None], **with_cache(llama, cache)).logits[:, -1]
            torch.testing.assert_close(out, logits)


@pytest.mark.parametrize("name", PARTS)
def test_stored(llama, name, tmp_path):
    ids, given = prompt(40, 2), torch.arange(12).reshape(6, 2) + 3
    straight = steps(llama, PARTS[name](), ids, given=given)
    with torch.no_grad(), attach(llama, PARTS[name]()):
        cache = cache_of(llama(ids, use_cache=True))
        for tokens in given[:4]:
            llama(tokens[:, None], **with_cache(llama, cache))
    save_cache(cache, tmp_path / "cache.safetensors", llama)
    with torch.no_grad(), attach(llama, PARTS[name]()):
        cache = load_cache(tmp_path / "cache.safetensors", llama)
        for tokens, logits in zip(given[4:], straight[4:], strict=True):
            out = llama(tokens[:, None], **with_cache(llama, cache)).logits[:, -1]
            torch.testing.assert_close(out, logits)


@pytest.mark.parametrize("name", EXACT)
def test_question_of_several_tokens(llama, name):
    """A question reads everything, and what follows it goes on selecting."""
    ids = prompt(40, 2)
    part = PARTS[name]()
    with torch.no_grad():
        alone = llama(torch.cat([ids, ids[:, :5]], 1)).logits[:, 40:]
    with torch.no_grad(), attach(llama, part) as session:
        cache = cache_of(llama(ids, use_cache=True))
        question = llama(ids[:, :5], **with_cache(llama, cache)).logits
        torch.testing.assert_close(question, alone)
        llama(ids[:, :1], **with_cache(llama, cache))
        assert session.read_bytes > 0



@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PARTS)
def test_half_precision(name, dtype):
    model = small_llama(dtype)
    with attach(model, PARTS[name]()):
        assert continued(model, prompt(24)).isfinite().all()
