"""block-sparse: the best blocks by their means, exact where all are read."""

import pytest
import torch

from attlas import masks, ops
from attlas.attach.thinned import Text
from attlas.parts.select.block_sparse import BlockSparse


def text(queries: int, keys: int) -> Text:
    q, k, v = (torch.randn(2, n, t, 8) for n, t in ((4, queries), (2, keys), (2, keys)))
    return Text(0, q, k, v, scale=8**-0.5)


@pytest.mark.parametrize(("queries", "keys"), [(37, 37), (9, 40), (2, 5)])
def test_all_blocks_are_full_attention(queries, keys):
    of, part = text(queries, keys), BlockSparse(keep=10, size=4)
    torch.testing.assert_close(
        part.attended(of), ops.attend(of.q, of.k, of.v, mask=masks.causal, scale=of.scale)
    )


@pytest.mark.parametrize(("queries", "keys"), [(24, 24), (12, 32), (23, 27), (13, 30)])
def test_blocks_are_those_of_the_best_means_and_no_query_is_without_one(queries, keys):
    of, size, keep = text(queries, keys), 4, 2
    seen = masks.dense(BlockSparse(keep=keep, size=size).pattern(of) & masks.causal, queries, keys)
    assert seen.any(-1).all()
    offset = keys - queries
    for row in range(-(-queries // size)):
        mean = of.q[0, 3, row * size : (row + 1) * size].mean(0)
        there = [j for j in range(-(-keys // size)) if j * size <= offset + row * size]
        beside = [j for j in range(-(-keys // size)) if 0 < j * size - offset - row * size < size]
        score = {j: float(mean @ of.k[0, 1, j * size : (j + 1) * size].mean(0)) for j in there}
        best = sorted(score, key=lambda j: -score[j])[: keep + (offset % size > 0 and not beside)]
        last = min((row + 1) * size, queries) - 1
        shown = {int(j) // size for j in seen[0, 3, last].nonzero()[:, 0]}
        assert shown == {j for j in [*best, *beside] if j * size <= offset + last}
