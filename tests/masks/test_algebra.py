"""Masks: random expressions lower to the same pairs on every route, and blocks never lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attlas import masks
from attlas.contract.masks import covered
from attlas.masks import Mask

# It is beartype, which looks at a random item of each list, that uses it.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

LENGTH = 40
HEADS, BATCH = 2, 2


def _leaves() -> st.SearchStrategy[Mask]:
    small = st.integers(1, 12)
    ids = torch.tensor([[0] * 9 + [1] * 20 + [2] * 11, [0] * 30 + [5] * 10])
    valid = torch.arange(LENGTH) >= torch.tensor([[0], [7]])
    table = torch.rand(HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) > 0.6
    return st.one_of(
        st.sampled_from([masks.causal, masks.full]),
        small.map(masks.window),
        small.map(masks.sinks),
        small.map(masks.prefix),
        small.map(masks.strided),
        small.map(masks.block),
        st.tuples(small, st.integers(1, 4)).map(lambda sizes: masks.dilated(*sizes)),
        st.sets(st.integers(0, LENGTH - 1), min_size=1, max_size=4).map(
            lambda indices: masks.keys(indices, LENGTH)
        ),
        st.integers(1, 5).map(lambda size: masks.blocks(masks.window(2) | masks.sinks(1), size)),
        st.sampled_from([
            masks.document(ids), masks.document(ids[0]), masks.padding(valid), masks.table(table),
            masks.table(table[0]), masks.per_head(masks.causal, masks.window(5)),
            masks.by_groups(masks.table(table[:1]), 2),
        ]),
    )  # fmt: skip


def _larger(inner: st.SearchStrategy[Mask]) -> st.SearchStrategy[Mask]:
    pair = st.tuples(inner, inner)
    return st.one_of(
        pair.map(lambda both: both[0] & both[1]),
        pair.map(lambda both: both[0] | both[1]),
        inner.map(lambda mask: ~mask),
        inner.map(lambda mask: mask.T),
    )


expressions = st.recursive(_leaves(), _larger, max_leaves=6)


lengths = st.sampled_from([1, 13, LENGTH])


@given(mask=expressions, block=st.sampled_from([1, 3, 8, 16, 64]), queries=lengths)
@settings(max_examples=150, deadline=None)
def test_blocks_never_claim_what_the_pairs_do_not_hold(
    mask: Mask, block: int, queries: int
) -> None:
    pairs = masks.dense(mask, queries, LENGTH)
    some, every = covered(pairs, block)
    claimed_some, claimed_every = masks.grid(mask, queries, LENGTH, q_block=block, k_block=block)
    assert not (some & ~claimed_some).any(), "a block with a visible pair is called empty"
    assert not (claimed_every & ~every).any(), "a block with a hidden pair is called whole"
    assert not (claimed_every & ~claimed_some).any()


@given(mask=expressions, block=st.sampled_from([8, 16]))
@settings(max_examples=60, deadline=None)
def test_block_mask_has_every_visible_block(mask: Mask, block: int) -> None:
    made = masks.block_mask(mask, LENGTH, LENGTH, block=block)
    some, _ = covered(masks.dense(mask, LENGTH, LENGTH), block)
    present = made.to_dense().bool()
    assert not (some & ~present).any()
    # What it calls whole is whole, and is not looked at again.
    whole = torch.zeros_like(present)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in present.shape[:3])):
        b, h, row = index.tolist()
        count = int(made.full_kv_num_blocks[b, h, row])
        whole[b, h, row, made.full_kv_indices[b, h, row, :count].long()] = True
    _, every = covered(masks.dense(mask, LENGTH, LENGTH), block)
    assert not (whole & ~every).any()


@given(mask=expressions, queries=lengths)
@settings(max_examples=60, deadline=None)
def test_sdpa_flags_show_the_same_pairs(mask: Mask, queries: int) -> None:
    pairs = masks.dense(mask, queries, LENGTH)
    flags = masks.sdpa_flags(mask, queries, LENGTH)
    shown = torch.ones(queries, LENGTH, dtype=torch.bool)
    if flags.get("is_causal"):
        shown = shown.tril()
    assert torch.equal(flags.get("attn_mask", shown).expand_as(pairs), pairs)


@given(a=expressions, b=expressions)
@settings(max_examples=60, deadline=None)
def test_de_morgan_and_double_negation(a: Mask, b: Mask) -> None:
    def pairs(mask: Mask) -> torch.Tensor:
        return masks.dense(mask, LENGTH, LENGTH).expand(BATCH, HEADS, -1, -1)

    assert torch.equal(pairs(~(a & b)), pairs(~a | ~b))
    assert torch.equal(pairs(~~a), pairs(a))
    assert torch.equal(pairs((a | b).T), pairs(a.T | b.T))


@given(mask=expressions, shift=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_relative_masks_do_not_feel_a_shift(mask: Mask, shift: int) -> None:
    if mask.relative:
        q, k = torch.arange(20), torch.arange(20)
        assert torch.equal(masks.at(mask, q, k), masks.at(mask, q + shift, k + shift))


def test_patterns_drawn() -> None:
    assert (masks.causal & (masks.window(2) | masks.sinks(1))).picture(4) == "\n".join(
        ["■···", "■■··", "■■■·", "■·■■"]
    )
    assert masks.dilated(2, 2).picture(5, 5).splitlines()[2] == "■·■·■"
    assert masks.block(2).picture(4) == "\n".join(["■■··", "■■··", "··■■", "··■■"])
    assert (masks.causal | masks.prefix(2)).picture(3) == "\n".join(["■■·", "■■·", "■■■"])


def test_documents_are_kept_apart() -> None:
    mask = masks.causal & masks.document(torch.tensor([0, 0, 1, 1]))
    assert mask.picture(4) == "\n".join(["■···", "■■··", "··■·", "··■■"])


def test_the_last_query_stands_at_the_last_key() -> None:
    assert torch.equal(
        masks.dense(masks.causal, 3, 10)[0, 0], masks.dense(masks.causal, 10, 10)[0, 0, -3:]
    )
    assert masks.dense(masks.causal, 3, 10, q_offset=0)[0, 0].sum() == 6


def test_bigbird_sees_window_ends_and_random_blocks() -> None:
    mask = masks.bigbird(64, heads=3, size=4, random=2, seed=7)
    pairs = masks.dense(mask, 64, 64)
    rows = covered(pairs, 4)[0]
    middle = rows[0, :, 2:-2]
    assert (middle.sum(-1) == 3 + 2 + 2).all()
    assert rows[0, :, [0, -1]].all()
    assert rows[..., [0, -1]].all()
    assert not torch.equal(rows[0, 0], rows[0, 1])
    again = masks.dense(masks.bigbird(64, heads=3, size=4, random=2, seed=7), 64, 64)
    assert torch.equal(pairs, again)


def test_a_window_of_65536_tokens_is_made_by_arithmetic() -> None:
    mask = masks.causal & masks.window(256)
    made = masks.block_mask(mask, 65536, 65536)
    assert int(made.kv_num_blocks.max()) + int(made.full_kv_num_blocks.max()) <= 4


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: masks.window(0), "size"),
        (lambda: masks.window(2.5), "size"),
        (lambda: masks.sinks(-1), "count"),
        (lambda: masks.strided(0), "stride"),
        (lambda: masks.dilated(2, 0), "dilation"),
        (lambda: masks.keys([9], 4), "indices"),
        (lambda: masks.keys([], 4), "indices"),
        (lambda: masks.bigbird(50, size=8), "length"),
        (lambda: masks.bigbird(48, size=8, window_blocks=2), "window_blocks"),
        (lambda: masks.bigbird(48, size=0), "size"),
        (lambda: masks.bigbird(48, size=8, random=-1), "random"),
        (lambda: masks.per_head(), "at least one"),
        (lambda: masks.document(torch.ones(3)), "ids"),
    ],
)
def test_wrong_sizes_are_refused_by_name(call, named: str) -> None:
    # TypeCheckError where shapes are checked at run time, as in these tests.
    with pytest.raises((ValueError, TypeError), match=named):
        call()


def test_masks_of_other_heads_or_batches_do_not_combine() -> None:
    with pytest.raises(ValueError, match="heads"):
        masks.per_head(masks.causal, masks.full) & masks.per_head(*[masks.causal] * 3)
    with pytest.raises(TypeError, match="mask"):
        masks.causal & True
