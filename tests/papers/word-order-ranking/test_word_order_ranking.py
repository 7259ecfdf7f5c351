"""word-order-ranking: every clause of the catalogue row's works_when.

What order is worth on the plays, MiniLM tuned: `attlas study word-order-ranking`.
"""

from __future__ import annotations

import random

import pytest
import torch

import attlas
from attlas.bases.text_ranking import TextRanker, Writer, permuted, shuffled, small_encoder
from attlas.tasks.passages import Sizes, draw, reciprocal_rank
from real_models import fetched


def one():
    return draw(random.Random(5), Sizes(), "test", 6)[0]


def scores(ranker, writer, candidates, places):
    torch.manual_seed(1)
    with torch.no_grad():
        return ranker(writer, [candidates], places)


def invariance(ranker, writer):
    """(largest change of a score by shuffling words: without positions, with them)."""
    mixed, found = shuffled(one(), random.Random(1)), []
    for places in ("none", "intact"):
        before, after = (scores(ranker, writer, each, places) for each in (one(), mixed))
        found.append(float((before - after).abs().max() / before.abs().max()))
    return found


def test_word_order_ranking_without_positions_no_order_of_words_changes_a_score():
    torch.manual_seed(0)
    without, with_them = invariance(TextRanker(small_encoder()).eval(), Writer())
    assert without < 1e-5
    assert with_them > 1e-3


def test_word_order_ranking_minilm_without_positions_no_order_changes_a_score():
    model, tokenizer = fetched("minilm")
    torch.manual_seed(0)
    without, with_them = invariance(TextRanker(model).eval(), Writer(tokenizer))
    assert without < 1e-5
    assert with_them > 1e-3


def test_word_order_ranking_segments_still_count():
    """Words that change sides change the score: what is left of order is the segment."""
    torch.manual_seed(0)
    ranker, writer, this = TextRanker(small_encoder()).eval(), Writer(), one()
    swapped = [(passage, this.query) for passage in this.documents]
    with torch.no_grad():
        before = ranker.cross(writer.pairs([(p, q) for q, p in swapped]), None, "none")
        after = ranker.cross(writer.pairs(swapped), None, "none")
    assert (before - after).abs().max() > 1e-3 * before.abs().max()


def test_word_order_ranking_shuffling_keeps_words_and_permuting_keeps_places():
    mixed = shuffled(one(), random.Random(1))
    assert mixed != one()
    assert sorted(mixed.query) == sorted(one().query)
    for passage, before in zip(mixed.documents, one().documents, strict=True):
        assert sorted(passage) == sorted(before)
    there = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    torch.manual_seed(0)
    places = permuted(there)
    assert sorted(places[0].tolist()) == list(range(7))
    assert sorted(places[1, :4].tolist()) == list(range(4))


def test_word_order_ranking_of_equal_scores_the_relevant_one_stands_in_the_middle():
    assert reciprocal_rank([3.0, 1.0, 2.0], 0) == 1
    assert reciprocal_rank([3.0, 1.0, 2.0], 1) == pytest.approx(1 / 3)
    assert reciprocal_rank([1.0, 1.0, 1.0], 1) == 1 / 2


def test_word_order_ranking_rows_tell_of_every_order():
    study = attlas.make("word-order-ranking", model="small", steps=2, questions=8, batch=2, passages=3)
    rows = {row.name: row.value for row in study.rows(0)}
    assert list(rows) == [
        "BM25", "intact", "shuffled, not tuned so", "permuted, not tuned so", "segments, not tuned so",
        "shuffled, tuned so", "permuted, tuned so", "segments, tuned so",
    ]  # fmt: skip
    assert all(0 < value <= 100 for value in rows.values())
