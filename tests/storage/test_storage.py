"""What a cache holds: bodies that grow row by row, layers that carry them, files that keep them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny_models
from attlas import ops
from attlas.attach import attach
from attlas.cache.prompt import prefill
from attlas.cache.quantizer import Quantizer
from attlas.cache.selection import Selection, keys_of, lengths_of
from attlas.calibration import calibrate
from attlas.errors import UserError
from attlas.hf.caches import cache_of, with_cache
from attlas.ops.quantize import encode
from attlas.options import option
from attlas.parts.evict.ada_kv import AdaKV
from attlas.parts.evict.key_norm import KeyNorm
from attlas.parts.evict.snapkv import SnapKV
from attlas.parts.quantize.eigen_attention import EigenAttention
from attlas.parts.select.lrqk import LRQK
from attlas.parts.select.quest import Quest
from attlas.storage import (
    Chosen,
    CodedBody,
    RaggedBody,
    StoredLayer,
    load_cache,
    save_cache,
)
from attlas.storage.growing import Growing
from attlas.storage.packed import PackedBody
from attlas.storage.plain import forked as forked_cache


class Coarse(Quantizer):
    """Keys and values in a few bits per token."""

    bits: int = option("bits of a number", default=8, kw_only=False)
    recent: int = option("newest tokens that stay", default=3)
    block: int = option("tokens encoded together", default=4)

    def encode(self, state, taken):
        k, v = (encode(x, self.bits, meta=torch.float32) for x in (taken.k, taken.v))
        return {"codes": CodedBody(k, v, taken.index, taken.first)}


class Pages(Selection):
    """The best pages by their bounds."""

    pages: int = option("pages that a step reads", kw_only=False)
    page: int = option("tokens of a page", default=4)
    recent: int = option("newest tokens that are always read", default=2)

    def choose(self, state, body, call):
        low, high = ops.page_bounds(keys_of(body), self.page)
        scores = ops.page_scores(call.q, low, high)
        lengths = lengths_of(body)
        if lengths is not None:
            first = torch.arange(scores.shape[-1]) * self.page
            scores = scores.masked_fill(first >= lengths[..., None], -torch.inf)
        return Chosen(ops.best_pages(scores, self.pages), self.page, body.slots)


METHODS = {
    "coarse": lambda: [Coarse()],
    "pages": lambda: [Pages(2)],
    "coarse pages": lambda: [Coarse(), Pages(2)],
    "evicted coarse": lambda: [SnapKV(0.5, window=4), Coarse()],
    "evicted coarse pages": lambda: [SnapKV(0.5, window=4), Coarse(), Pages(2)],
}
every_method = pytest.mark.parametrize("method", METHODS)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(0, 7))
@settings(max_examples=25, deadline=None)
def test_growing_appends_like_concatenation(lengths, forked):
    pieces = [torch.randn(2, 3, n, 4) for n in lengths]
    growing = Growing(pieces[0])
    fork, whole = None, None
    for number, piece in enumerate(pieces[1:], start=1):
        if number == forked:
            fork, whole = growing.fork(), growing.tensor.clone()
            growing.append(torch.randn(2, 3, 1, 4))  # what one fork takes in the other never sees
            growing = fork.fork()
        growing.append(piece)
    if fork is None:
        assert torch.equal(growing.tensor, torch.cat(pieces, dim=2))
    else:
        assert torch.equal(fork.tensor, whole)
        assert torch.equal(growing.tensor[:, :, : whole.shape[2]], whole)


def test_growing_keeps_within_two_per_cent():
    growing = Growing(torch.zeros(1, 2, 1000, 8))
    moved = 0
    for _ in range(200):
        before = growing.tensor.data_ptr()
        growing.append(torch.ones(1, 2, 1, 8))
        moved += growing.tensor.data_ptr() != before
        assert growing.nbytes <= 1.02 * growing.tensor.numel() * 4
    assert moved < 20


def coded(x, index=None, first=0, group=1):
    k, v = (encode(t, 4, token_group=group, channel_group=8 // group) for t in (x, x + 1))
    return CodedBody(k, v, index, first)


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=1, max_size=4),
    st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_rows_of_unequal_length_grow_each_at_its_own_end(turns, codes):
    block, body = 4, None
    expected = [[], []]
    for number, counts in enumerate(turns):
        width = block * max(max(counts), 1)
        x = torch.randn(2, 3, width, 8)
        columns = torch.arange(width) + 100 * number
        there = columns - 100 * number < torch.tensor(counts)[:, None] * block
        index = torch.where(there, columns, -1)[:, None].expand(-1, 3, -1).to(torch.int32)
        index = index.contiguous()
        make = (lambda x, i: coded(x, i)) if codes else (lambda x, i: PackedBody(x, x + 1, i))
        new = make(x, index)
        read = new.read()[0]
        for row, count in enumerate(counts):
            expected[row].append((read[row, :, : count * block], columns[: count * block]))
        if body is None:
            body = new
        else:
            assert body.alike(new)
            body.append(new)
    for row in range(2):
        keys = torch.cat([k for k, _ in expected[row]], dim=1)
        columns = torch.cat([c for _, c in expected[row]])
        assert torch.equal(body.read()[0][row, :, : keys.shape[1]], keys)
        assert body.index[row, 0, : len(columns)].tolist() == columns.tolist()
        assert (body.index[row, :, len(columns) :] == -1).all()
        assert int(body.lengths[row, 0]) == len(columns)


def test_groups_of_tokens_grow_whole():
    body, more = coded(torch.randn(1, 2, 16, 8), group=8), torch.randn(1, 2, 8, 8)
    other = coded(more, first=16, group=8)
    whole = torch.cat([body.read()[0], other.read()[0]], dim=2)
    assert body.alike(other)
    body.append(other)
    assert torch.equal(body.read()[0], whole)
    assert not body.alike(coded(more, first=24))  # another format
    assert not body.alike(coded(more, first=30, group=8))  # not what comes next


def test_ragged_bytes_follow_the_sum_of_the_lengths():
    keys = torch.randn(2, 3, 50, 16)
    keep = torch.rand(2, 3, 50) < torch.tensor([0.1, 0.5, 0.9])[None, :, None]
    columns = torch.arange(50).expand(2, 3, -1)
    body = RaggedBody.kept(keys, keys + 1, columns, keep)
    assert body.nbytes == int(keep.sum()) * (2 * 16 * 4 + 4) + 2 * 3 * (8 + 4)
    q = torch.randn(2, 6, 1, 16)
    out, lse = ops.decode(q, [body.segment()])
    mask = keep.repeat_interleave(2, dim=1)[:, :, None]
    expected = ops.attend(q, keys, keys + 1, mask=mask, return_lse=True, q_offset=0)
    torch.testing.assert_close((out, lse), expected)
    rotated = body.rows(lambda x: x[[1, 0]])
    torch.testing.assert_close(ops.decode(q[[1, 0]], [rotated.segment()])[0], out[[1, 0]])
    assert rotated.k.data_ptr() == body.k.data_ptr()


def test_take_drops_padding_and_counts_by_row():
    layer = StoredLayer()
    keys = torch.arange(10.0)[None, None, :, None].expand(2, 2, -1, 4).clone()
    layer.update(keys, keys)
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[0, :3] = False
    assert layer.lengths(layer.rows(valid)) == [7, 10]
    taken = layer.take([4, 8], layer.rows(valid))
    assert taken.index[0, 0].tolist() == [3, 4, 5, 6, -1, -1, -1, -1]
    assert taken.k[1, 0, :, 0].tolist() == list(range(8))
    assert layer.original_positions()[0, 0].tolist() == [7, 8, 9]
    assert layer.original_positions()[1, 0].tolist() == [8, 9, -1]
    assert layer.ragged
    layer.update(keys[:, :, :1], keys[:, :, :1])
    assert layer.original_positions()[1, 0].tolist() == [8, 9, -1, 10]


def continued(model, parts, ids, mask, beams=1):
    with attach(model, *parts):
        return tiny_models.greedy(model, ids, 9, attention_mask=mask, num_beams=beams)


@every_method
@pytest.mark.parametrize("beams", [1, 2])
def test_padding_and_batches_change_nothing(method, beams):
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    make = METHODS[method]
    both = continued(model, make(), ids, mask, beams)
    first = continued(model, make(), ids[:1, 9:], mask[:1, 9:], beams)
    second = continued(model, make(), ids[1:], mask[1:], beams)
    assert both == first + second


def eigen(model):
    part = EigenAttention(keep=0.75)
    part.calibration = calibrate(model, part, [tiny_models.prompt(1, 60, seed=3)])
    return part


@pytest.mark.parametrize("forked", [False, True])
@pytest.mark.parametrize("name", [*METHODS, "ragged", "tiered", "tiered pages", "low rank", "lrqk"])
def test_rows_in_another_order_go_on_as_they_were(name, forked):
    more = {
        "ragged": lambda: [AdaKV(0.5, scorer_options={"window": 4})],
        "tiered": lambda: [Quest(0.4, page=2, dense_layers=(), offload=True)],
        "tiered pages": lambda: [Quest(0.3, page=4, dense_layers=(), offload=True, shared=False)],
        "low rank": lambda: [eigen(model)],
        "lrqk": lambda: [LRQK(0.4, rank=4, recent=4, block=2)],
    }
    model, ids = tiny_models.decoder("llama").double(), tiny_models.prompt(2, 30)
    steps, found = tiny_models.prompt(2, 16, seed=3), []
    for swapped in (False, True):
        given, order, kept = {**METHODS, **more}[name](), [0, 1], []
        with attach(model, *given) as session, torch.no_grad():
            model(ids)
            for number in range(16):
                cache = session.cache
                if number == 6:
                    left = forked_cache(cache) if forked else None
                    if swapped:
                        order = [1, 0]
                        cache.reorder_cache(torch.tensor(order))
                token = steps[order, number : number + 1]
                kept.append(model(token, **with_cache(model, cache)).logits[order])
            if forked:  # which nothing has moved
                kept.append(model(steps[:, 6:7], **with_cache(model, left)).logits)
        found.append(torch.cat(kept, dim=1))
    torch.testing.assert_close(found[1], found[0], atol=1e-9, rtol=1e-9)


@every_method
def test_forks_files_and_crops_go_on_alike(method, tmp_path):
    model, ids = tiny_models.decoder("qwen3"), tiny_models.prompt(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    parts = METHODS[method]()
    prompt = prefill(model, ids, [parts], mask)
    steps = tiny_models.prompt(2, 8, seed=3)

    def read(cache, count):
        found = []
        for number in range(count):
            seen = torch.cat([mask, mask.new_ones(2, number + 1)], dim=1)
            found.append(
                model(
                    steps[:, number : number + 1], **with_cache(model, cache), attention_mask=seen,
                    position_ids=seen.sum(-1, keepdim=True) - 1,
                ).logits
            )  # fmt: skip
        return torch.cat(found, dim=1)

    with torch.no_grad(), attach(model, *parts) as session:
        here = read(prompt.fork(parts), 8)
        again = prompt.fork(parts)
        save_cache(again, tmp_path / "prompt.safetensors", model)
        assert torch.equal(read(again, 8), here)
        loaded = load_cache(tmp_path / "prompt.safetensors", model, tokens=30)
        assert torch.equal(read(loaded, 2), here[:, :2])
        assert session.kv_bytes > 0
        loaded.crop(-1)
        assert loaded.get_seq_length() == 31
        with pytest.raises(UserError, match="compressed context"):
            loaded.crop(-20)


def test_an_encoded_cache_is_not_read_by_the_model_alone():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(1, 24)
    with torch.no_grad():
        with attach(model, Coarse()):
            cache = cache_of(model(ids))
        with pytest.raises(UserError, match="inside attach"):
            model(ids[:, :1], **with_cache(model, cache))


def test_files_of_other_models_types_and_lengths_are_refused(tmp_path):
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(1, 24)
    path = tmp_path / "cache.safetensors"
    with torch.no_grad(), attach(model, Coarse()) as session:
        model(ids)
    save_cache(session.cache, path, model)
    with pytest.raises(UserError, match=r"another model: its kind is llama, this model's is qwen3"):
        load_cache(path, tiny_models.decoder("qwen3"))
    with pytest.raises(UserError, match=r"context of 24 tokens, 30 were asked for"):
        load_cache(path, model, tokens=30)
    with pytest.raises(UserError, match=r"holds float32, this model computes in bfloat16"):
        load_cache(path, tiny_models.decoder("llama").to(torch.bfloat16))
    model.get_input_embeddings().weight.data.add_(1.0)
    with pytest.raises(UserError, match="weights"):
        load_cache(path, model)
    with pytest.raises(UserError, match="no stored cache"):
        load_cache(tmp_path / "other.safetensors", model)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        load_cache(path, model)


def test_parts_that_cannot_work_together_are_refused_by_name():
    model = tiny_models.decoder("llama")
    for parts, said in (
        ([Coarse(), Coarse(4)], "only one part can quantize"),
        ([SnapKV(0.5), SnapKV(0.25)], "only one part can evict"),
        ([Pages(2), Coarse()], "other order"),
        ([Coarse(), SnapKV(0.5)], "other order"),
        ([KeyNorm(0.5, while_decoding=True), Coarse()], "while_decoding of KeyNorm"),
    ):
        with pytest.raises(UserError, match=said):
            attach(model, *parts)


@pytest.mark.parametrize("tokens", [1024, 4096, 8192])
def test_bytes_held_are_bytes_promised(tokens):
    """16-bit keys of 4 heads of 64: codes, steps and zeros to the byte, and what stays dense."""
    keys = torch.randn(1, 4, tokens, 64, dtype=torch.bfloat16)
    layer = StoredLayer()
    layer.update(keys, keys)
    part = Coarse(bits=4, recent=64, block=64)
    from attlas.storage import LayerState

    part.compress(layer, LayerState(0, (0,)), layer.rows())
    encoded = tokens - 64
    promise = 4 * 2 * (encoded * (32 + 8) + 64 * 128)
    assert layer.nbytes == promise
    assert tokens * 4 * 2 * 128 / layer.nbytes > 2.8
