"""LongHeads: distances, memory and what is read."""

import pytest
import torch

from attlas import attach
from attlas.cache.prompt import prefill
from attlas.contract.parts import continued, prompt, small_llama
from attlas.hf.caches import cache_of, with_cache
from attlas.parts.select.longheads import LongHeads
from attlas.storage.layer import LayerState
from attlas.storage.rotary import Rotary


def test_longheads_stays_within_the_trained_length():
    """Of a moved query: chunks 0, o − 1 and others, ascending, every distance below the length."""
    part, dim, chunks = LongHeads(4, 20), 8, 15
    rotary = Rotary.plain(dim)
    torch.manual_seed(0)
    state = LayerState(0, (0,), rotary=rotary)
    state.tensors["chunks"] = torch.randn(1, 3, chunks, dim)
    rank = torch.arange(20, 60)[None]
    raw = torch.randn(1, 3, 40, dim)
    index, moved = part.pick(state, rotary.rotate(raw, rank), rank, rank)
    own = rank // 4
    assert index.shape == (1, 3, 40, 4)
    assert (index[..., 0] == 0).all()
    assert (index[..., -1] == own[:, None] - 1).all()
    assert (index.diff(dim=-1) > 0).all()
    scores = raw @ state.tensors["chunks"].mT
    for query in range(40):
        free = scores[0, 1, query, 1 : own[0, query] - 1]
        best = (free.topk(min(2, len(free))).indices + 1).sort().values
        assert torch.equal(index[0, 1, query, 1:-1].long(), best)
    # Where the moved query stands tells the distance to a key of the chunk, as it was cached.
    for place in range(4):
        stand = place * 4 + (4 - place) * 4 + rank % 4 - place * 4  # from the chunk's first token
        at = index[0, 0, :, place].long() * 4 + stand[0]
        expected = rotary.rotate(raw[:, :1], at[None])
        torch.testing.assert_close(moved[:, :1, :, place], expected, atol=1e-5, rtol=1e-4)
        assert (stand >= 1).all()
        assert (stand < 20).all()


def test_all_chunks_are_full_attention():
    """Chosen from the second chunk on, with room for all, also after an exact prefill."""
    model, ids = small_llama(), prompt(30, 2)
    plain = continued(model, ids)
    part = LongHeads(4, 40, begin=4)
    with attach(model, part):
        torch.testing.assert_close(continued(model, ids), plain)
    read = prefill(model, ids, [part], chunk=7)
    with torch.no_grad(), attach(model, part):
        cache, token = read.fork(part), read.logits.argmax(-1)
        for logits in plain[1:]:
            found = model(token[:, None], **with_cache(model, cache)).logits[:, -1]
            torch.testing.assert_close(found.float(), logits)
            token = found.argmax(-1)


def test_a_step_reads_its_chunks_alone():
    model, ids = small_llama(), prompt(41)
    with torch.no_grad(), attach(model, LongHeads(4, 12)):
        cache = cache_of(model(ids, use_cache=True))
        model(ids[:, :1], **with_cache(model, cache))
        layer = cache.layers[3]
    pair = 2 * 8 * 8
    # Four query heads read two chunks each; the tail's two tokens are read once for two key heads.
    assert (
        layer.read_bytes
        == 4 * 2 * 4 * pair + 2 * 2 * pair + layer.learned["LongHeads"].tensors["chunks"].nbytes
    )
    held = {name: list(t.shape) for name, t in layer.learned["LongHeads"].tensors.items()}
    assert held == {"chunks": [1, 4, 10, 8], "pending": [1, 4, 2, 8]}


def test_chunk_keys_grow_as_a_prompt_makes_them():
    model, ids = small_llama(), prompt(41)
    with torch.no_grad(), attach(model, LongHeads(4, 40)):
        whole = cache_of(model(ids, use_cache=True))
    with torch.no_grad(), attach(model, LongHeads(4, 40)):
        cache = cache_of(model(ids[:, :10], use_cache=True))
        for i in range(10, 41):
            model(ids[:, i : i + 1], **with_cache(model, cache))
    for one, other in zip(whole.layers, cache.layers, strict=True):
        for name in ("chunks", "pending"):
            a, b = (layer.learned["LongHeads"].tensors[name] for layer in (one, other))
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"page": 0}, "page"),
        ({"page": 4, "length": 14}, "length"),
        ({"page": 4, "length": 8}, "length"),
        ({"page": 4, "length": 16, "begin": 6}, "begin"),
        ({"page": 4, "length": 1024}, "512 positions"),
    ],
)
def test_refuses(options, named):
    with pytest.raises(ValueError, match=named), attach(small_llama(), LongHeads(**options)):
        pass
