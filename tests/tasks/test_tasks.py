from __future__ import annotations

import math

import pytest
import torch

from attlas.tasks import haystack as needle
from attlas.tasks.compare import fidelity
from attlas.tasks.compare.perplexity import perplexity, surprise
from attlas.tasks.continuation import continuation
from attlas.tasks.peak import Peak
from attlas.tasks.record import mean, median, pooled_fraction, share
from attlas.tasks.text import passage, shakespeare


class Letters:
    """A tokenizer of single letters."""

    chat_template = None

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def batch_decode(self, batch: list[list[int]]) -> list[str]:
        return ["".join(map(chr, ids)) for ids in batch]


class Chatting(Letters):
    chat_template = "yes"

    def apply_chat_template(self, messages: list[dict[str, str]], **options: object) -> str:
        return f"<user>{messages[0]['content']}</user><assistant>"


class Opening(Letters):
    """Puts a sign in front of every text, as Gemma's tokenizer does."""

    def __call__(self, text: str, add_special_tokens: bool = True, **options: object):
        front = "^" if add_special_tokens else ""
        return super().__call__(front + text)

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return list(map(chr, ids))


def test_texts_open_as_the_tokenizer_opens_them():
    hay = needle.single(Opening(), 2000, 0.5, "0/a")
    assert text(hay.context).startswith("^Read")
    assert text(hay.context).count("^") == 1
    assert "^" not in text(hay.asked[0].question)
    read = continuation(Opening(), 50, 10, "0")
    assert text(read.context)[0] == "^"
    assert len(read.context) == 50
    assert read.context[1:] == continuation(Letters(), 50, 10, "0").context[:-1]


def text(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_the_works_are_shipped():
    assert len(shakespeare()) > 5_000_000
    import random

    assert passage(random.Random(1), 500) == passage(random.Random(1), 500)
    with pytest.raises(ValueError, match="characters"):
        passage(random.Random(1), 0)


@pytest.mark.parametrize("depth", [0.1, 0.5, 0.9])
def test_a_needle_lies_at_its_depth_and_only_there(depth):
    hay = needle.single(Letters(), 2000, depth, "0/a")
    assert len(hay.context) == 2000
    (key,) = hay.asked
    found = text(hay.context)
    assert found.count(key.number) == 1
    assert found.index(key.number) / 2000 == pytest.approx(depth, abs=0.08)
    assert key.city in text(key.question)
    assert key.number not in text(key.question)
    assert needle.single(Letters(), 2000, depth, "0/a") == hay
    assert needle.single(Letters(), 2000, depth, "1/a") != hay


def test_several_needles_hide_more_than_is_asked():
    hay = needle.several(Letters(), 2000, (0.1, 0.5, 0.9), "0")
    assert text(hay.context).count("special magic number for") == 4
    assert [key.depth for key in hay.asked] == [0.1, 0.5, 0.9]
    assert len({key.city for key in hay.asked}) == 3


def test_the_question_is_no_part_of_the_context():
    hay = needle.single(Chatting(), 1000, 0.5, "0")
    assert text(hay.context).startswith("<user>")
    assert "What is" not in text(hay.context)
    question = text(hay.asked[0].question)
    assert "</user><assistant>" in question


def test_too_short_a_length_is_refused():
    with pytest.raises(ValueError, match="too short for 4 needles; take at least"):
        needle.several(Letters(), 200, (0.5,), "0")


@pytest.mark.parametrize(
    ("answer", "right", "digits"),
    [(" 1234567.", True, 1.0), ("It is 1234567", True, 1.0), (" 1234", False, 4 / 7),
     (" 12345678", False, 1.0), (" 9234567", False, 0.0), ("none", False, 0.0)],
)  # fmt: skip
def test_answers_are_held_to_every_digit(answer, right, digits):
    key = needle.Key(0.5, "London", "1234567", [])
    assert needle.correct(key, answer) is right
    assert needle.digits(key, answer) == pytest.approx(digits)
    assert needle.finished(" 1234567.")
    assert not needle.finished(" 1234567")


def test_shares_have_wilsons_interval():
    # Wilson (1927), 7 of 10: 0.397 to 0.892.
    found = share(7, 10)
    assert (found.low, found.high) == (pytest.approx(0.3968, abs=1e-3), pytest.approx(0.8922, 1e-3))
    assert share(10, 10).high == 1.0
    assert share(10, 10).low > 0.7
    with pytest.raises(ValueError, match="hits"):
        share(3, 2)


def test_pooling_cells_equals_pooling_samples():
    first, second = [0.1, 0.4, 0.9], [0.2, 0.8]
    cells = [(m.value, m.n, m.sd) for m in (mean(first), mean(second))]
    pooled, whole = pooled_fraction(cells), mean(first + second)
    assert pooled.value == pytest.approx(whole.value)
    assert pooled.sd == pytest.approx(whole.sd)


def test_medians_name_their_extremes():
    found = median([3.0, 1.0, 2.0, 10.0], floor=0.5)
    assert (found.value, found.low, found.high, found.floor) == (2.5, 1.0, 10.0, 0.5)


def test_fidelity_of_a_model_to_itself_is_perfect():
    logits = torch.randn(9, 20)
    assert fidelity.divergence(logits, logits + 3).abs().max() < 1e-5
    assert all(fidelity.agreement(logits, logits))
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert fidelity.divergence(p.log(), q.log()).item() == pytest.approx(expected, rel=1e-5)


def test_perplexity_of_a_uniform_guess_is_the_vocabulary():
    logits = torch.zeros(30, 17)
    found = perplexity(surprise(logits, torch.arange(30) % 17).tolist())
    assert found.value == pytest.approx(17)


def test_a_continuation_follows_its_context():
    found = continuation(Letters(), 300, 20, "0")
    assert (len(found.context), len(found.fed), len(found.targets)) == (300, 20, 20)
    assert found.fed[1:] == found.targets[:-1]
    assert text(found.context + found.fed) in shakespeare()


def test_peak_memory_sees_what_was_held():
    peak = Peak(torch.device("cpu"))
    held = torch.ones(20_000_000)
    size = held.numel() * 4
    del held
    assert 0.8 * size < peak.bytes() < 3 * size
