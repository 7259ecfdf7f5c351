"""The recorder of patterns at all scales, against all weights."""

from __future__ import annotations

import pytest
import torch

from attlas.attach import attach
from attlas.contract.parts import prompt, small_llama
from attlas.hf.caches import cache_of, with_cache
from attlas.parts.evict.snapkv import SnapKV
from attlas.parts.record.patterns import PatternRecorder
from attlas.parts.record.pyramid import Pyramid


def recorded(model, *pieces, parts=(), **options):
    """(the recorder, all weights) of a sequence that comes in pieces."""
    recorder, cache = PatternRecorder(**options), None
    with torch.no_grad(), attach(model, *parts, record=[recorder, "weights"]) as session:
        for piece in pieces:
            given = {"use_cache": True} if cache is None else with_cache(model, cache)
            cache = cache_of(model(piece, **given))
        return recorder, session["weights"]


@pytest.mark.parametrize("sizes", [[24], [10, 10, 4], [20, 1, 1, 1, 1]])
def test_patterns_are_the_weights(sizes):
    recorder, weights = recorded(small_llama(), *prompt(24, 2).split(sizes, dim=1))
    for row in range(2):
        found = recorder.patterns(row)
        assert len(found) == 6 * 4
        for (layer, head), pattern in found.items():
            torch.testing.assert_close(pattern.dense(), weights[layer, row, head].float())
    assert recorder.result()["whole"].shape == (6, 2, 4, 24, 24)


def test_patterns_of_chosen_heads_of_a_long_text():
    """In blocks of queries, as the model attends to long texts; each query's strongest keys."""
    recorder, weights = recorded(small_llama(), prompt(512), prompt(200), heads={1: [3], 4: [0, 2]})
    found = recorder.patterns()
    assert list(found) == [(1, 3), (4, 0), (4, 2)]
    for (layer, head), pattern in found.items():
        expected = Pyramid.of(weights[layer, 0, head])
        assert pattern.whole is None
        for name in ("mass", "maxima", "index", "weight", "rest"):
            torch.testing.assert_close(getattr(pattern, name), getattr(expected, name))
    with pytest.raises(ValueError, match=r"patterns\(\) tells each alone"):
        recorder.result()


def test_patterns_beside_a_cache_policy_stand_in_original_positions():
    model, ids = small_llama(), prompt(24)
    recorder, weights = recorded(model, ids, ids[:, :1], parts=[SnapKV(keep=0.3, window=4)])
    for (layer, head), pattern in recorder.patterns().items():
        torch.testing.assert_close(pattern.dense(), weights[layer, 0, head].float())


def test_patterns_begin_anew_and_take_back():
    model, ids = small_llama(), prompt(24)
    recorder = PatternRecorder()
    with torch.no_grad(), attach(model, record=[recorder]):
        model(prompt(30, seed=5))
        model(ids)
    whole, _ = recorded(model, ids[:, :17])
    recorder.take_back(17)
    for at, pattern in recorder.patterns().items():
        torch.testing.assert_close(pattern.dense(), whole.patterns()[at].dense())
