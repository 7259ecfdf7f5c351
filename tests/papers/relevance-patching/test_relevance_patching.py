"""What the row of relevance patching says, sentence by sentence."""

from __future__ import annotations

import pytest
import torch

from attlas.analyses.relevance_patching import RelevancePatching, drawn_beside, groups, judgements
from attlas.contract.analyses import sample
from attlas.errors import UserError
from attlas.inspect.prompts import Prompts, effect, logit_difference
from attlas.inspect.runs import accuracy, differences, kept, logits_with, patched_points
from attlas.models.load import load_tokenizer
from attlas.parts.patch.replace import Replace


@pytest.fixture(scope="module")
def tokenizer():
    try:
        return load_tokenizer("smollm2")
    except UserError as error:
        pytest.skip(str(error))


def test_relevance_patching_all_of_the_last_layer_restores_all():
    subject = sample("prompts")
    every = tuple(range(subject.prompts.clean.shape[1]))
    found = patched_points(subject.model, subject.prompts, "residual", groups=[every])
    torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=1e-12)


@pytest.mark.parametrize("point", ["residual", "attention", "mlp", "heads"])
def test_relevance_patching_with_the_same_prompt_is_nothing(point):
    subject = sample("prompts")
    model, prompts = subject.model, subject.prompts
    clean, corrupted = differences(model, prompts)
    own = kept(model, prompts.corrupted, (point,)).passed[point]
    logits = logits_with(model, prompts.corrupted, Replace({point: own}))
    assert effect(logit_difference(logits, prompts.answers).mean(), clean, corrupted) == 0


def test_relevance_patching_groups_are_of_tokens():
    subject = sample("prompts")
    named = groups(subject.prompts)
    assert named == {"document": (4,), "behind": tuple(range(5, 11)), "last": (11,)}
    each = patched_points(subject.model, subject.prompts, "residual")
    grouped = RelevancePatching(ablated=0).look(subject)
    torch.testing.assert_close(each[:, [4, 11]], grouped.arrays["residual"][:, [0, 2]])
    # Before the first block what decides stands in the document alone.
    first = torch.tensor([1.0, 0.0, 0.0]).double()
    torch.testing.assert_close(grouped.arrays["residual"][0], first, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="the twins must differ"):
        groups(Prompts(ids := subject.prompts.clean, ids, subject.prompts.answers))


def test_relevance_patching_accuracy_counts_both_twins():
    subject = sample("prompts")
    found = [differences(subject.model, subject.prompts[n : n + 1]) for n in range(2)]
    expected = sum((c > 0).item() + (x < 0).item() for c, x in found) / 4
    assert accuracy(subject.model, subject.prompts) == expected
    assert set(drawn_beside([(3, 0), (3, 2), (5, 1)], 4, 0)).isdisjoint([(3, 0), (3, 2), (5, 1)])


@pytest.mark.parametrize("way", ["pointwise", "pairwise"])
def test_relevance_patching_judgements_differ_in_their_documents(way, tokenizer):
    found = judgements(tokenizer, 12, way, seed=3)
    again = judgements(tokenizer, 12, way, seed=3)
    assert torch.equal(found.clean, again.clean)
    for clean, corrupted, (right, _) in zip(found.clean, found.corrupted, found.answers, strict=True):
        texts = [tokenizer.decode(ids) for ids in (clean, corrupted)]
        query = texts[0].partition("Query: ")[2].partition("\n")[0].split()
        assert query == texts[1].partition("Query: ")[2].partition("\n")[0].split()
        assert len(query) == 3
        documents = [text.partition("\nQuery:")[0] for text in texts]
        if way == "pointwise":
            assert all(word in documents[0] for word in query)
            assert tokenizer.decode(right) == " Yes"
            continue
        a, b = documents[0].split("\nPassage B:\n")
        relevant = a if tokenizer.decode(right) == " A" else b
        assert all(word in relevant for word in query)
    if way == "pairwise":
        assert len(found.answers[:, 0].unique()) == 2  # each letter is right now and then
    with pytest.raises(ValueError, match="length=2"):
        judgements(tokenizer, 1, way, length=2)
