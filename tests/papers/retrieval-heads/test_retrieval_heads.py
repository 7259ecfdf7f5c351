"""What the row of retrieval heads says, sentence by sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from attlas.analyses.retrieval_heads import (
    NEEDLE,
    MostAttended,
    RetrievalHeads,
    copy_scores,
    find_needle,
    masked,
    most_attended,
    prompts,
    recall,
)
from attlas.attach import attach
from attlas.contract.analyses import Letters
from attlas.contract.parts import prompt, small_llama
from attlas.inspect.runs import greedy
from attlas.inspect.subject import Subject

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "heads-smollm2-retrieval-cpu.json"


def test_retrieval_heads_scores_count_steps_that_copy_from_the_needle():
    ids = torch.tensor([7, 3, 5, 5, 9, 3])
    generated = torch.tensor([5, 9, 3])
    attended = torch.tensor([
        [2, 4, 5],  # both from the needle [2, 5); the third token stands behind it
        [3, 1, 1],  # the other 5 of the needle
        [0, 2, 4],  # tokens that are not generated
    ])[None, :, :, None]  # fmt: skip
    score = copy_scores(attended, generated, ids, (2, 5))
    torch.testing.assert_close(score, torch.tensor([[2, 1, 0]]) / 3)


def test_retrieval_heads_recorder_tells_the_largest_weights():
    model, ids = small_llama(), prompt(20, 2)
    with torch.no_grad(), attach(model, MostAttended(3), record=["weights"]) as session:
        model(ids)
        weights, found = session["weights"], session["most-attended"]
    expected = weights.topk(3, dim=-1)
    at = weights.gather(-1, found.long())
    rows = torch.arange(20) >= 2  # earlier ones see fewer than three keys
    torch.testing.assert_close(at[..., rows, :], expected.values[..., rows, :])
    few = most_attended(torch.tensor([[0.4, 0.6]]), torch.tensor([4, 8]), 3)
    assert few.tolist() == [[8, 4, 4]]


def test_retrieval_heads_steps_record_what_one_pass_does():
    model, ids = small_llama(), prompt(20)[0]
    recorder, whole = MostAttended(), MostAttended()
    said = greedy(model, ids, 5, record=[recorder])
    text = torch.cat([ids, torch.tensor(said[:-1])])
    with torch.no_grad(), attach(model, record=[whole]):
        logits = model(text[None]).logits
    assert logits[0, 19:].argmax(-1).tolist() == said
    assert torch.equal(recorder.result(), whole.result()[:, :, :, 19:])


def test_retrieval_heads_stop_at_the_end_of_a_turn():
    model, ids = small_llama(), prompt(20)[0]
    said = greedy(model, ids, 5)
    assert greedy(model, ids, 5, stop=[said[1]]) == said[: said.index(said[1]) + 1]


def test_retrieval_heads_masked_attend_to_all_alike():
    model, ids = small_llama(), prompt(12)
    with torch.no_grad(), attach(model, record=["weights"]) as session:
        model(ids)
        plain = session["weights"]
    with torch.no_grad(), attach(model, *masked(model, {0: [1]}), record=["weights"]) as session:
        model(ids)
        found = session["weights"]
    alike = torch.ones(12, 12).tril() / torch.arange(1, 13)[:, None]
    torch.testing.assert_close(found[0, 0, 1], alike.to(found))
    others = [0, 2, 3]
    assert torch.equal(found[0, 0, others], plain[0, 0, others])
    assert masked(model, {}) == masked(model, {3: []}) == []


def test_retrieval_heads_prompts_hold_their_needle_at_its_depth():
    found = prompts(Letters(), (300,), 3, seed=4)
    assert [p.key.depth for p in found] == [0.0, 0.5, 1.0]
    for each in found:
        first, end = each.needle
        assert each.ids[first:end].tolist() == Letters()(each.sentence)["input_ids"]
        assert each.key.number in each.sentence
        assert len(each.sentence) == end - first == len(NEEDLE.format(city=each.key.city, number=123))
    again = prompts(Letters(), (300,), 3, seed=4)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(found, again, strict=True))


def test_retrieval_heads_needles_are_found_by_their_words():
    assert find_needle([1, 2, 3, 4, 5, 6], [3, 4, 5]) == (2, 5)
    needle = list(range(20))
    assert find_needle([90, 91, 99, *needle[1:], 92], needle) == (2, 22)  # its first token is another
    with pytest.raises(ValueError, match="does not hold the needle"):
        find_needle([1, 2], [3, 4, 5])
    assert recall("The number is 7.", "the number is 8") == 0.75
    assert recall("a a b", "A c") == pytest.approx(1 / 3)


def test_retrieval_heads_need_a_tokenizer():
    with pytest.raises(ValueError, match="tokenizer"):
        RetrievalHeads().look(Subject(small_llama()))


def test_retrieval_heads_of_smollm2_are_few_and_needles_hang_on_them():
    """Eight needles of 128 tokens for the scores, eight new ones for masking."""
    scores, *masking = json.loads(RESULTS.read_text())["results"]
    assert 0 < scores["above"] < 0.1 * scores["of"]
    found = {row["masked"]: row["found"] for row in masking}
    assert all(row["heads"] == 10 for row in masking if row["masked"] != "none")
    assert found["the best"] < 0.5 * found["others, drawn"]
