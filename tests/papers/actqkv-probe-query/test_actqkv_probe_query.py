"""ActQKV: probes, windows and the layers' shares."""

import pytest
import torch

from attlas import attach
from attlas.cache.probes import Running, page_cosines, probe
from attlas.contract.parts import continued, prompt, small_llama
from attlas.hf.caches import cache_of, with_cache
from attlas.parts.select.actqkv import ActQKV


def test_actqkv_probe_query_without_bias_is_the_mean_query():
    """Equal tokens depart equally; and so long as too few windows were seen."""
    torch.manual_seed(0)
    everything = torch.ones(2, 5, dtype=torch.bool)
    running = Running.empty(torch.zeros(2, 5, 6))
    for _ in range(4):
        window = torch.randn(2, 5, 6)
        query, weights, running = probe(window, everything, running, 3)
        torch.testing.assert_close(query, window.mean(1))
        assert (weights == 0.2).all()
    one = torch.randn(2, 1, 6).expand(-1, 5, -1)
    torch.testing.assert_close(probe(one, everything, running, 3)[0], one[:, 0])
    still = Running(one[:, 0], torch.ones(2, 6), torch.tensor([9, 9]))
    torch.testing.assert_close(probe(one, everything, still, 3)[0], one[:, 0])
    odd = one.clone()
    odd[:, 2] += 5
    assert (probe(odd, everything, still, 3)[1][:, 2] > 0.8).all()


def test_rows_without_tokens_change_nothing():
    torch.manual_seed(0)
    there = torch.tensor([[True, True, False], [False, False, False], [True, True, True]])
    windows = torch.randn(3, 3, 3, 4)
    running = Running.empty(windows[0])
    alone = Running.empty(windows[0][:1, :2])
    for window in windows:
        query, weights, running = probe(window, there, running, 1)
        other, own, alone = probe(window[:1, :2], there[:1, :2], alone, 1)
        torch.testing.assert_close(query[:1], other)
        torch.testing.assert_close(weights[:1, :2], own)
        assert (weights[1] == 0).all()
    assert running.windows.tolist() == [3, 0, 3]
    torch.testing.assert_close(running.var[:1], alone.var)


def test_cosine_is_that_of_all_heads_side_by_side():
    asked, pages = torch.randn(2, 6, 4), torch.randn(2, 3, 5, 4)
    beside = pages.repeat_interleave(2, dim=1).transpose(1, 2).flatten(2)
    expected = torch.cosine_similarity(asked.flatten(1)[:, None], beside, dim=-1)
    torch.testing.assert_close(page_cosines(asked, pages), expected)


def test_layers_share_the_total():
    """Every step reads as many pages in all, no layer less than 0.7 or more than 2 averages."""
    model, ids = small_llama(), prompt(120, 2)
    mask = torch.ones_like(ids)
    mask[0, :33] = 0
    part, found = ActQKV(tokens=20, page=2, window=16, sinks=4, recent=8, horizon=1), []
    share = part._share

    def spy(*given):
        found.append(share(*given))
        return found[-1]

    part._share = spy
    with torch.no_grad(), attach(model, part):
        cache = cache_of(model(ids, attention_mask=mask, use_cache=True))
        for state in (layer.learned[part.name] for layer in cache.layers):
            # Layers differ by what they were asked before: here as much as they can.
            state.tensors["entropy"] = torch.full((2, 1), 0.1 + state.layer)
        for i in range(4):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            model(ids[:, i : i + 1], attention_mask=mask, **with_cache(model, cache))
    pages = torch.stack(found).unflatten(0, (4, 6))
    assert (pages.sum(1) == 6 * 10).all()
    assert pages.min() >= 7
    assert pages.max() <= 20
    assert (pages[0, 0] == 7).all()
    assert (pages[0, 5] > 10).all()


def test_windows_read_first_tokens_pages_and_the_newest():
    """What a window may see beside what its probe chose: everything near, nothing later."""
    model, ids = small_llama(), prompt(60)
    exact = continued(model, ids)
    part = ActQKV(tokens=4, page=2, window=8, sinks=4, recent=6, horizon=1)
    read, inner = [], part._read

    def spy(state, scores, start, there, k):
        at, seen = inner(state, scores, start, there, k)
        read.append((int(start[0]), at[0][seen[0]].tolist()))
        return at, seen

    part._read = spy
    with attach(model, part):
        assert (continued(model, ids) - exact).abs().max() > 1e-6
    assert [start for start, _ in read[:8]] == list(range(0, 60, 8))
    for start, at in read:
        assert len(at) == len(set(at))
        needed = set(range(4)) | set(range(max(4, start - 6), min(start + 8, 60)))
        assert needed <= set(at)
        far = [t for t in at if 4 <= t < (max(0, start - 6) // 2) * 2]
        assert len(far) == min(4, max(0, (start - 6) // 2 * 2 - 4))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "keep"),
        ({"keep": 2.0}, "keep"),
        ({"tokens": 33}, "tokens"),
        ({"keep": 0.5, "sinks": 40}, "sinks"),
        ({"keep": 0.5, "window": 0}, "window"),
        ({"keep": 0.5, "recent": -1}, "recent"),
        ({"keep": 0.5, "horizon": 0}, "horizon"),
    ],
)
def test_refuses(options, named):
    with pytest.raises(ValueError, match=named):
        ActQKV(**options)
