"""vertical-slash: the keys and distances that the last queries weigh most, exact where all are read."""

import pytest
import torch

from attlas import masks, ops
from attlas.attach.thinned import Text
from attlas.parts.select import vertical_slash
from attlas.parts.select.vertical_slash import VerticalSlash


def text(queries: int, keys: int) -> Text:
    q, k, v = (torch.randn(2, n, t, 8) for n, t in ((4, queries), (2, keys), (2, keys)))
    return Text(0, q, k, v, scale=8**-0.5)


@pytest.mark.parametrize("options", [{"verticals": 64}, {"slashes": 64}])
@pytest.mark.parametrize(("queries", "keys"), [(37, 37), (9, 40), (2, 5)])
def test_all_keys_or_all_distances_are_full_attention(options, queries, keys):
    of, part = text(queries, keys), VerticalSlash(size=4, **{"verticals": 1, "slashes": 1, **options})
    torch.testing.assert_close(
        part.attended(of), ops.attend(of.q, of.k, of.v, mask=masks.causal, scale=of.scale)
    )


@pytest.mark.parametrize(("queries", "keys"), [(24, 24), (13, 30), (300, 300)])
@pytest.mark.parametrize("verticals", [1, 9])
def test_blocks_and_single_keys_apart_are_attention_under_the_pattern(
    queries, keys, verticals, monkeypatch
):
    monkeypatch.setattr(vertical_slash, "ROWS", 8)
    of = text(queries, keys)
    part = VerticalSlash(verticals=verticals, slashes=3, first=1, near=1, last=5, size=4)
    out = ops.attend(of.q, of.k, of.v, mask=part.pattern(of) & masks.causal, scale=of.scale)
    torch.testing.assert_close(part.attended(of), out)


@pytest.mark.parametrize(("queries", "keys"), [(24, 24), (13, 30)])
def test_the_pattern_is_what_the_last_queries_tell(queries, keys):
    of = text(queries, keys)
    part = VerticalSlash(verticals=3, slashes=3, first=1, near=1, last=5, size=1)
    seen = masks.dense(part.pattern(of) & masks.causal, queries, keys)
    offset = keys - queries
    for head in range(4):
        scores = of.q[1, head] @ of.k[1, head // 2].T * of.scale
        causal = torch.ones(queries, keys, dtype=torch.bool).tril(offset)
        rows = scores.masked_fill(~causal, -torch.inf).softmax(-1)[-5:]
        column = {j: float(rows[:, j].sum()) for j in range(1, keys)}
        slash = {
            d: sum(float(rows[i, keys - 5 + i - d]) for i in range(5) if keys - 5 + i >= d)
            for d in range(1, keys)
        }
        keep = {0, *sorted(column, key=lambda j: -column[j])[:2]}
        far = {0, *sorted(slash, key=lambda d: -slash[d])[:2]}
        i, j = torch.arange(offset, keys)[:, None], torch.arange(keys)
        wanted = torch.isin(j, torch.tensor(list(keep))) | torch.isin(i - j, torch.tensor(list(far)))
        assert torch.equal(seen[1, head], wanted & causal)


def test_blocks_hold_what_a_slash_crosses():
    of = text(29, 41)
    fine, coarse = (
        VerticalSlash(verticals=1, slashes=4, first=0, near=1, last=8, size=size) for size in (1, 4)
    )
    small, large = (masks.dense(p.pattern(of) & masks.causal, 29, 41) for p in (fine, coarse))
    assert (small <= large).all()
    assert large.float().mean() < 0.6


@pytest.mark.parametrize(("queries", "keys"), [(24, 24), (13, 30)])
def test_density_counts_single_keys_and_crossed_blocks(queries, keys):
    of = text(queries, keys)
    for first in (1, 20):  # the second lists keys that early queries do not see
        part = VerticalSlash(verticals=20, slashes=3, first=first, near=1, last=5, size=1)
        part.attended(of)
        seen = masks.dense(part.pattern(of) & masks.causal, queries, keys)
        pairs = torch.ones(queries, keys).tril(keys - queries).sum()
        torch.testing.assert_close(part.density[0], seen.float().mean(0).sum((1, 2)) / pairs)
    # Single keys count as such in blocks of four.
    coarse = VerticalSlash(verticals=8, slashes=1, first=8, near=1, last=5, size=4)
    coarse.attended(of)
    assert (coarse.density[0] < 0.75).all()
