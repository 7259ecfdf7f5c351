"""Two tiers: what is listed is read as it is, and only what is missing is moved."""

import pytest
import torch

from attlas import ops
from attlas.errors import UserError
from attlas.storage.packed import PackedBody
from attlas.storage.tiered import TieredBody


def both(rows=2, slots=20, index=None, **options):
    torch.manual_seed(0)
    k, v = torch.randn(rows, 2, slots, 4), torch.randn(rows, 2, slots, 6)
    return PackedBody(k, v, index), TieredBody(k, v, index, **options)


def lists(rows, heads, slots, count, steps, page=1):
    torch.manual_seed(1)
    pages = -(-slots // page)
    order = torch.rand(steps, rows, heads, pages).argsort(-1)[..., :count]
    return order.sort(-1).values.to(torch.int32)


@pytest.mark.parametrize("page", [1, 3])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("capacity", [None, 16])
def test_reads_what_is_listed_and_moves_the_misses(heads, page, capacity):
    index = torch.arange(20, dtype=torch.int32).expand(2, 2, -1).clone()
    index[1, :, 13:] = -1
    packed, tiered = both(index=index, capacity=capacity)
    q = torch.randn(2, 4, 1, 4)
    has = [[set() for _ in range(heads)] for _ in range(2)]
    hits = misses = 0
    for step, listed in enumerate(lists(2, heads, 20, 5, 12, page)):
        listed[1, :, 3:] = -1
        expected, _ = ops.decode(q, [packed.segment(listed, page)])
        segment = tiered.segment(listed, page)
        assert torch.equal(ops.decode(q, [segment])[0], expected)
        assert tiered.segment(listed, page) is segment  # the same list is no new request
        for row, length in enumerate((20, 13)):
            for head in range(heads):
                pages = [p for p in listed[row, head].tolist() if p >= 0]
                wanted = {s for p in pages for s in range(p * page, p * page + page) if s < length}
                hits += len(wanted & has[row][head])
                misses += len(wanted - has[row][head])
                has[row][head] = set(tiered.tier.slot[row, head].tolist()) - {-1}
                assert wanted <= has[row][head]
        assert (tiered.hits, tiered.misses) == (hits, misses), step
    assert tiered.moved == misses * (4 + 6) * 4
    assert hits
    width = tiered.tier.slot.shape[-1]
    assert width == (capacity or 5 * page)
    assert tiered.nbytes == 2 * heads * width * (4 + 6) * 4
    assert tiered.host_bytes >= 2 * 2 * 20 * (4 + 6) * 4


def test_longest_unused_goes_first():
    _, body = both(rows=1, capacity=4)
    for slots in ([0, 1], [2, 3], [0, 4], [1]):
        body.segment(torch.tensor([[slots, slots]], dtype=torch.int32))
    # 4 took the place of 1, the longest unused but for 0, which was listed; then 1 that of 2.
    assert set(body.tier.slot[0, 0].tolist()) == {0, 1, 3, 4}
    assert (body.hits, body.misses) == (2 * 1, 2 * 6)


def test_grows_and_changes_rows_and_forks():
    packed, tiered = both()
    q, listed = torch.randn(2, 4, 1, 4), lists(2, 2, 20, 6, 1)[0]
    tiered.segment(listed)
    more = torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 6)
    fork = tiered.fork()
    for body in (packed, tiered):
        body.append(type(body)(*more, None, 20))
    listed = torch.tensor([0, 5, 21, 22], dtype=torch.int32).expand(2, 2, -1)
    expected = ops.decode(q, [packed.segment(listed)])[0]
    assert torch.equal(ops.decode(q, [tiered.segment(listed)])[0], expected)
    assert all(torch.equal(a, b) for a, b in zip(tiered.read(), packed.read(), strict=True))
    assert fork.slots == 20
    rotated = tiered.rows(lambda x: x.index_select(0, torch.tensor([1, 0], device=x.device)))
    before = rotated.misses
    out = ops.decode(q, [rotated.segment(listed.clone())])[0]
    other = packed.rows(lambda x: x[[1, 0]])
    assert torch.equal(out, ops.decode(q, [other.segment(listed)])[0])
    assert rotated.misses == before  # each row kept what it had on the device
    restored = TieredBody.restored(tiered.tensors, tiered.constants)
    assert torch.equal(restored.read()[0], packed.read()[0])


def test_everything_can_be_read_and_too_much_is_refused():
    packed, tiered = both(capacity=3)
    q = torch.randn(2, 4, 1, 4)
    all_of_it = ops.decode(q, [tiered.segment()])[0]
    assert torch.equal(all_of_it, ops.decode(q, [packed.segment()])[0])
    with pytest.raises(UserError, match="capacity=3"):
        tiered.segment(torch.arange(4, dtype=torch.int32).expand(2, 2, -1))
