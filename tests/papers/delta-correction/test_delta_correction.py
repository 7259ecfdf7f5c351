"""A sparse prefill, and its correction by every γ-th query's full attention."""

from __future__ import annotations

import random

import pytest
import torch

import tiny_models
from attlas import masks, ops
from attlas.attach import Part, attach
from attlas.contract.families import distinct, find
from attlas.parts.evict.snapkv import SnapKV
from attlas.parts.select.delta_correction import DeltaCorrection
from attlas.parts.select.sparse_prefill import Ranked, SparsePrefill
from attlas.tasks.text import passage


class Thin(Part):
    """The same pattern as a mask, for prompts without padding."""

    def __init__(self, sinks, window):
        self.pattern = masks.causal & (masks.window(window) | masks.sinks(sinks))

    def mask(self, call):
        if call.q.shape[2] == 1:
            return None
        return masks.dense(self.pattern, call.q.shape[2], call.k.shape[2])


class Errors(Part):
    """How far each layer's heads would be from full attention: sparse, and corrected."""

    def __init__(self, pattern, **options):
        self.pattern, self.asked, self.found = pattern, options, []

    def output(self, call, heads):
        q, k, v, full = call.q, call.k, call.v, heads.transpose(1, 2)
        sparse = ops.attend(q, k, v, mask=self.pattern)
        both = sparse, ops.delta_correction(q, k, v, sparse, **self.asked)
        self.found.append([(x - full)[:, :, :-32].norm(dim=-1).mean() for x in both])
        return heads


def logits(model, ids, *parts, **options):
    with torch.no_grad(), attach(model, *parts):
        return model(ids, **options).logits


def padded(side, ids, count=9):
    """Mask and positions with the first row shorter."""
    mask = torch.ones_like(ids)
    if side == "hole":
        mask[0, 40 : 40 + count] = 0
    else:
        mask[0, slice(0, count) if side == "left" else slice(ids.shape[1] - count, None)] = 0
    return mask, (mask.cumsum(-1) - 1).clamp(min=0)


PARTS = {
    "sparse": lambda: [SparsePrefill(sinks=3, recent=20)],
    "corrected": lambda: [SparsePrefill(sinks=3, recent=20), DeltaCorrection(6, tail=10)],
}


@pytest.mark.parametrize(
    "kind", distinct("rotary", "windows", "soft-caps", "sinks", having=["full"])
)
def test_the_pattern_as_attention_and_as_a_mask(kind):
    model, ids = tiny_models.decoder(kind), tiny_models.prompt(2, 60)
    if "windows" not in find(kind).traits:
        ours = logits(model, ids, SparsePrefill(sinks=3, recent=20))
        torch.testing.assert_close(ours, logits(model, ids, Thin(3, 20)), atol=1e-4, rtol=1e-4)
    full = logits(model, ids)
    for parts in PARTS.values():
        assert (logits(model, ids, *parts()) - full).abs().max() > 1e-2
    whole = logits(model, ids, SparsePrefill(sinks=0, recent=60), DeltaCorrection(6, tail=10))
    torch.testing.assert_close(whole, full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [60, 300])
@pytest.mark.parametrize("side", ["left", "right", "hole"])
@pytest.mark.parametrize("parts", PARTS)
def test_padding_changes_nothing(parts, side, tokens):
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, tokens)
    mask, positions = padded(side, ids)
    together = logits(model, ids, *PARTS[parts](), attention_mask=mask, position_ids=positions)
    for row in range(2):
        valid = mask[row].bool()
        alone = logits(model, ids[row : row + 1, valid], *PARTS[parts]())
        torch.testing.assert_close(together[row, valid], alone[0], atol=1e-4, rtol=1e-4)


def test_generated_tokens_do_not_depend_on_padding():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 60)
    mask, _ = padded("left", ids)
    for parts in PARTS.values():
        with attach(model, *parts(), SnapKV(0.5, window=4)):
            together = tiny_models.greedy(model, ids, attention_mask=mask)
        with attach(model, *parts(), SnapKV(0.5, window=4)):
            assert tiny_models.greedy(model, ids[:1, 9:])[0] == together[0]


def test_chunks_are_sparse_as_the_whole():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 60)
    for mask in (None, padded("left", ids)[0]):
        options = {} if mask is None else {"attention_mask": mask}
        with attach(model, SparsePrefill(sinks=3, recent=20)):
            expected = tiny_models.greedy(model, ids, **options)
            assert tiny_models.greedy(model, ids, prefill_chunk_size=17, **options) == expected
    with attach(model, SparsePrefill(sinks=3, recent=20), DeltaCorrection(6, tail=4)):
        assert len(tiny_models.greedy(model, ids, prefill_chunk_size=17)[0]) == 10


def test_a_mask_of_the_users_own_is_kept():
    """Two texts packed into one row stay apart, in what is sparse and in what is dense."""
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(1, 60)
    texts = torch.tensor([0] * 25 + [1] * 35)
    own = (texts[:, None] == texts) & torch.ones(60, 60, dtype=torch.bool).tril()
    positions = torch.cat([torch.arange(25), torch.arange(35)])[None]
    changed = ids.clone()
    changed[0, 3] = 5
    sparse = SparsePrefill(sinks=3, recent=20)
    for parts in ([sparse], [sparse, DeltaCorrection(1, tail=1)]):
        a, b = (
            logits(model, i, *parts, attention_mask=own[None, None], position_ids=positions)
            for i in (ids, changed)
        )
        torch.testing.assert_close(a[0, 25:], b[0, 25:], atol=1e-5, rtol=1e-5)
        assert (a[0, 24] - b[0, 24]).abs().max() > 1e-3


@pytest.mark.parametrize("sparse", [SparsePrefill(sinks=3, recent=20), Thin(3, 20)])
def test_gamma_1_and_short_prompts_are_exact(sparse):
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 60)
    full = logits(model, ids)
    for correction in (DeltaCorrection(1, tail=1), DeltaCorrection(8, tail=55), DeltaCorrection()):
        ours = logits(model, ids, sparse, correction)
        torch.testing.assert_close(ours, full, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", distinct("soft-caps", "sinks"))
def test_gamma_1_keeps_soft_caps_and_sink_logits(kind):
    model, ids = tiny_models.decoder(kind), tiny_models.prompt(2, 40)
    mask, positions = padded("left", ids)
    options = {"attention_mask": mask, "position_ids": positions}
    full = logits(model, ids, **options)
    parts = SparsePrefill(sinks=2, recent=5), DeltaCorrection(1, tail=1)
    ours = logits(model, ids, *parts, **options)
    valid = mask.bool()
    torch.testing.assert_close(ours[valid], full[valid], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("gamma", "tail"), [(1, 1), (4, 4), (7, 16), (7, 3), (5, 40), (64, 128)])
def test_the_op_is_its_definition(gamma, tail):
    q = torch.randn(2, 4, 37, 8).double()
    k, v = torch.randn(2, 2, 50, 8).double(), torch.randn(2, 2, 50, 6).double()
    sparse = torch.randn(2, 4, 37, 6).double()
    valid = torch.ones(2, 37, dtype=torch.bool)
    valid[0, :5] = valid[1, 20:23] = False
    dense = ops.attend(q, k, v, mask=masks.causal, route="reference")
    for given in (None, valid):
        expected = sparse.clone()
        for row in range(2):
            at = torch.arange(37) if given is None else given[row].nonzero()[:, 0]
            end = len(at) - len(at) % gamma - max(tail, gamma)
            for t, column in enumerate(at.tolist()):
                s = at[gamma * (t // gamma) if t < end else t]
                moved = dense[row, :, s] - sparse[row, :, s]
                expected[row, :, column] += moved
        found = ops.delta_correction(q, k, v, sparse, gamma=gamma, tail=tail, valid=given)
        torch.testing.assert_close(found, expected)
    seen = torch.rand(2, 1, 37, 50) > 0.3
    bias = torch.randn(4, 37, 50).double()
    odd = {"visible": seen, "score_mod": lambda s, b, h, q, k: s + bias[h, q - 13, k]}
    whole = ops.attend(q, k, v, mask=seen, score_mod=odd["score_mod"], route="reference")
    found = ops.delta_correction(q, k, v, sparse, gamma=1, tail=tail, **odd)
    torch.testing.assert_close(found, whole)


def test_more_dense_queries_than_fit_at_once():
    q, k, v = (torch.randn(1, 2, 600, 4) for _ in range(3))
    found = ops.delta_correction(q, k, v, torch.zeros_like(q), gamma=2, tail=400)
    expected = ops.attend(q, k, v, mask=masks.causal)
    torch.testing.assert_close(found[:, :, 200:], expected[:, :, 200:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, :, 0:200:2], expected[:, :, 0:200:2], atol=1e-5, rtol=1e-5)


def test_what_is_not_visible_is_not_visited():
    """Blocks that the grid of a ranked pattern calls empty or full are so, pair by pair."""
    valid = torch.rand(3, 200) > 0.3
    pattern = Ranked(masks.causal & (masks.window(30) | masks.sinks(4)), valid) & masks.padding(
        valid
    )
    dense = masks.dense(pattern, 150, 200)
    some, every = masks.grid(pattern, 150, 200, q_block=16, k_block=8)
    for i in range(some.shape[2]):
        for j in range(some.shape[3]):
            block = dense[:, :, 16 * i : 16 * i + 16, 8 * j : 8 * j + 8].flatten(1)
            assert not (block.any(1) & ~some[:, 0, i, j]).any()
            assert not (every[:, 0, i, j] & ~block.all(1)).any()
    assert some.float().mean() < 0.7


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: SparsePrefill(sinks=-1), "sinks"),
        (lambda: SparsePrefill(recent=0), "recent"),
        (lambda: DeltaCorrection(0), "gamma"),
        (lambda: DeltaCorrection(8, tail=0), "tail"),
        (lambda: ops.delta_correction(*[torch.zeros(1, 1, 4, 2)] * 4, gamma=-1), "gamma"),
    ],
)
def test_bad_options(make, name):
    with pytest.raises(ValueError, match=name):
        make()


def test_delta_correction_on_smollm2(smollm2):
    """The mean error of the heads' outputs falls against the uncorrected prefill, in every layer.

    Of this small model every fourth query has to be dense: its attention to what lies behind a
    window changes so fast that what is borrowed from 16 queries before is no better than nothing.
    """
    model, tokenizer = smollm2
    ids = tokenizer(passage(random.Random(3), 4000), return_tensors="pt").input_ids[:, :500]
    pattern = SparsePrefill(sinks=4, recent=32).pattern
    errors = Errors(pattern, gamma=4, tail=16)
    logits(model, ids, errors)
    sparse, corrected = torch.tensor(errors.found).T
    assert corrected.mean() < 0.85 * sparse.mean()
    assert (corrected < sparse).all()
