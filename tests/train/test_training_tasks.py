"""What the tasks draw: the answers they ask for are the ones their definitions give."""

from __future__ import annotations

import math
import re

import pytest
import torch

from attlas.errors import UserError
from attlas.tasks.text import shakespeare
from attlas.tasks.train import burgers as burgers_task
from attlas.tasks.train import darcy as darcy_task
from attlas.tasks.train import find, known, shakespeare_bpe
from attlas.tasks.train.base import IGNORED
from attlas.tasks.train.burgers import solve as burgers
from attlas.tasks.train.darcy import solve as darcy
from attlas.tasks.train.numbers import _WORDS as WORDS
from attlas.tasks.train.shakespeare_bytes import windows
from attlas.tasks.train.spelling import spelt
from attlas.train.data import drawn

ANSWERED = [n for n, c in known().items() if c.needs == "decoder" and c.best == 1.0]
CHEAP = {"darcy": {"points": 4}, "burgers": {"points": 16}}


@pytest.fixture(autouse=True)
def few_fields(monkeypatch):
    for module in (burgers_task, darcy_task):
        monkeypatch.setattr(module, "TRAINED", 4)
        monkeypatch.setattr(module, "TESTED", 4)
        module.solved.cache_clear()
    yield
    for module in (burgers_task, darcy_task):
        module.solved.cache_clear()


def made(name: str):
    return find(name)(**CHEAP.get(name, {}))


@pytest.mark.parametrize("name", [n for n in known() if n != "shakespeare-bpe"])
def test_batches_are_decided_by_their_place_and_fit_the_sizes(name):
    task = made(name)
    first, again, other = (drawn(task, 4, "train", 0, step) for step in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
    for split in task.splits:
        batch = drawn(task, 4, split, 0)
        assert all(len(tensor) == 4 for tensor in batch.values())
        assert task.terms(batch) > 0
        if "input_ids" in batch:
            assert batch["input_ids"].shape[1] <= task.sizes.length
            assert int(batch["input_ids"].min()) >= 0
            assert int(batch["input_ids"].max()) < max(task.sizes.outputs, task.sizes.source)
        if task.needs != "operator" and batch["targets"].dtype == torch.long:
            assert int(batch["targets"].max()) < task.sizes.outputs


@pytest.mark.parametrize("name", ANSWERED)
def test_a_model_that_knows_the_answers_reaches_the_ceiling(name):
    task = made(name)
    for split in task.splits:
        batch = drawn(task, 4, split, 0)
        wanted = batch["targets"].clamp(min=0)
        output = torch.nn.functional.one_hot(wanted, task.sizes.outputs).float()
        right, count = task.score(output, batch)
        assert right == count == task.terms(batch)
        assert float(task.loss(50 * output, batch)) < 1e-6 * count
        wrong, _ = task.score(output.roll(1, -1), batch)
        assert wrong == 0


def asked(batch):
    """(row, place, answer) of everything asked for."""
    rows, places = (batch["targets"] != IGNORED).nonzero(as_tuple=True)
    return zip(rows.tolist(), places.tolist(), batch["targets"][rows, places].tolist(), strict=True)


@pytest.mark.parametrize("name", ["recall", "extrapolation"])
def test_recall_asks_for_the_value_after_the_key(name):
    task = find(name)()
    batch = drawn(task, 8, task.splits[-1], 0)
    answers = list(asked(batch))
    assert len(answers) == 8 * task.pairs
    for row, place, answer in answers:
        tokens = batch["input_ids"][row].tolist()
        at = tokens.index(tokens[place])
        assert at % 2 == 0
        assert at < 2 * task.pairs <= place
        assert tokens[at + 1] == answer


def test_induction_asks_for_what_followed_the_first_time():
    batch = drawn(find("induction")(), 4, "train", 0)
    for row, place, answer in asked(batch):
        tokens = batch["input_ids"][row].tolist()
        assert tokens[tokens.index(tokens[place]) + 1] == answer


def test_selective_copy_asks_for_the_symbols_in_their_order():
    task = find("selective-copy")()
    batch = drawn(task, 4, "train", 0)
    for tokens, targets in zip(batch["input_ids"].tolist(), batch["targets"].tolist(), strict=True):
        assert [t for t in tokens if t > 1] == [t for t in targets if t != IGNORED]
        assert tokens[task.length :] == [1] * task.count


@pytest.mark.parametrize("split", ["test", "sparse", "dense"])
def test_flip_flop_reads_what_was_written_last(split):
    batch = drawn(find("flip-flop")(), 8, split, 0)
    for row, place, answer in asked(batch):
        tokens = batch["input_ids"][row].tolist()
        assert tokens[place] == 2
        writes = [i for i in range(0, place, 2) if tokens[i] == 0]
        assert tokens[writes[-1] + 1] == answer


@pytest.mark.parametrize("split", ["test", "more passes"])
def test_counting_counts_since_the_last_set(split):
    task = find("counting")(most=3)
    batch = drawn(task, 8, split, 0)
    for row, place, answer in asked(batch):
        tokens = batch["input_ids"][row, : place + 1].tolist()
        since = tokens[len(tokens) - tokens[::-1].index(0) :]
        assert answer == min(3, since.count(1))
    passes = (batch["input_ids"] == 2).float().mean()
    assert (passes > 0.8) == (split == "more passes")


def test_sorting_and_reversing_say_what_they_are_called():
    for name, change in (("sorting", sorted), ("reversing", lambda x: x[::-1])):
        task = find(name)()
        batch = drawn(task, 4, "train", 0)
        for tokens, targets in zip(
            *(batch[k].tolist() for k in ("input_ids", "targets")), strict=True
        ):
            assert targets[task.count :] == list(change(tokens[: task.count]))
            assert targets[: task.count] == [IGNORED] * task.count


def test_noise_asks_for_the_marked_value_and_a_decoy_stands_beside_it():
    task = find("noise")()
    for split in task.splits:
        batch = drawn(task, 4, split, 0)
        for row, place, answer in asked(batch):
            tokens = batch["input_ids"][row].tolist()
            key = tokens[place]
            assert tokens[place - 1] == 1
            begin = len(tokens) - 2 * task.needles
            marked = [i for i in range(begin) if tokens[i] == 0 and tokens[i + 1] == key]
            assert [tokens[i + 2] for i in marked] == [answer]
            assert tokens[:begin].count(key) >= 2


def test_regression_is_solved_by_least_squares():
    task = find("regression")()
    batch = drawn(task, 4, "train", 0)
    inputs = batch["inputs"].double()
    x, y = inputs[:, ::2, : task.dim], inputs[:, 1::2, task.dim]
    output = torch.zeros(4, 2 * task.points - 1, 1)
    for k in range(task.dim, task.points):
        w = torch.linalg.lstsq(x[:, :k], y[:, :k, None]).solution
        output[:, 2 * k] = (x[:, k, None] @ w)[:, 0]
    errors, count = task.score(output, batch)
    assert errors / count < 1e-6
    silent, count = task.score(torch.zeros_like(output), drawn(task, 4, "train", 1))
    assert 0.3 < silent / count < 3


def test_bytes_are_counted_and_parts_held_apart():
    task = find("shakespeare-bytes")()
    uniform = torch.zeros(2, task.length, 256)
    bits, count = task.score(uniform, drawn(task, 2, "test", 0))
    assert bits / count == pytest.approx(8.0, rel=1e-5)
    train, test = (
        windows(torch.Generator(), torch.arange(1000), 500, 9, s) for s in ("train", "test")
    )
    assert int(train.max()) < 900 <= int(test.min())


def test_tokens_stand_for_all_bytes(monkeypatch):
    text = shakespeare()[:20000]
    monkeypatch.setattr(shakespeare_bpe, "shakespeare", lambda: text)
    for cached in (shakespeare_bpe.encoding, shakespeare_bpe.encoded):
        cached.cache_clear()
    task = find("shakespeare-bpe")(tokens=300, length=16)
    ids, widths = shakespeare_bpe.encoded(300)
    assert int(widths[ids.long()].sum()) == len(text.encode())
    assert shakespeare_bpe.encoding(300).decode(ids.tolist()) == text
    batch = drawn(task, 2, "test", 0)
    bits, count = task.score(torch.zeros(2, 16, 300), batch)
    said = "".join(shakespeare_bpe.encoding(300).decode(row) for row in batch["targets"].tolist())
    assert count == len(said.encode())
    assert bits == pytest.approx(32 * math.log2(300), rel=1e-5)
    for cached in (shakespeare_bpe.encoding, shakespeare_bpe.encoded):
        cached.cache_clear()


def test_digits_are_held_apart():
    from attlas.tasks.train.digits import images

    train, test = images("train")[0], images("test")[0]
    assert len(train) + len(test) == 1797
    assert float(train.min()) == -1.0
    assert float(train.max()) == 1.0


def test_shifted_digits_lie_where_they_are_said_to_lie():
    from attlas.tasks.train.digits import images

    task, known = made("digits-shifted"), images("test")[0]
    pixels, classes, corners = task.placed(torch.Generator().manual_seed(1), 64, "test")
    assert pixels.shape == (64, 1, 20, 20)
    assert float(pixels.min()) == 0
    assert float(pixels.max()) <= 1
    assert len(corners.unique(dim=0)) > 32
    clean = type(task)(**{**task.options, "specks": 0.0})
    clean = clean.placed(torch.Generator().manual_seed(1), 64, "test")
    assert torch.equal(clean[1], classes)
    assert torch.equal(clean[2], corners)
    for picture, specked, (top, left) in zip(clean[0], pixels, corners.tolist(), strict=True):
        digit = picture[0, top : top + 8, left : left + 8]
        assert ((known[:, 0] + 1) / 2 == digit).flatten(1).all(1).any()
        assert picture.sum() == digit.sum()
        assert 0 < (specked > picture).double().mean() < 0.25


def test_dates_and_numbers_are_translated():
    for name, meant in (("dates", r"\d{4}-\d\d-\d\d"), ("numbers", r"\d+")):
        batch = drawn(find(name)(), 8, "train", 0)
        for row in range(8):
            source = spelt(batch["input_ids"][row].tolist())
            answer = spelt([t for t in batch["targets"][row].tolist() if t != IGNORED])
            assert re.fullmatch(meant, answer)
            if name == "numbers":
                assert [WORDS[int(d)] for d in answer] == source.split()
            else:
                assert answer[:4] in source
            fed = batch["decoder_input_ids"][row].tolist()
            assert fed[0] == 1
            assert spelt(fed) == answer


def test_burgers_solver_conserves_and_converges():
    def wave(n: int):
        x = torch.arange(n, dtype=torch.float64) / n
        return (torch.sin(2 * math.pi * x) + 0.3)[None]

    coarse, middle, fine = (burgers(wave(n), 0.05, 0.2)[:, :: n // 32] for n in (32, 64, 128))
    ratio = (coarse - middle).norm() / (middle - fine).norm()
    assert 3 < float(ratio) < 5.5  # second order: errors fall by four as points double
    assert float(burgers(wave(64), 0.05).mean()) == pytest.approx(0.3, abs=1e-12)
    small = burgers(1e-6 * (wave(128) - 0.3), 0.05, 0.5)
    decay = float(small.norm() / (1e-6 * (wave(128) - 0.3)).norm())
    assert decay == pytest.approx(math.exp(-0.05 * 4 * math.pi**2 * 0.5), rel=1e-3)


def test_darcy_solver_agrees_with_poisson_on_even_ground():
    n = 32
    middle = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    x, y = torch.meshgrid(middle, middle, indexing="ij")
    odd = range(1, 60, 2)
    series = sum(
        torch.sin(i * math.pi * x) * torch.sin(j * math.pi * y) / (i * j * (i * i + j * j))
        for i in odd
        for j in odd
    ) * (16 / math.pi**4)
    found = darcy(torch.ones(1, n, n, dtype=torch.float64))[0]
    assert float((found - series).norm() / series.norm()) < 5e-3
    twice = darcy(torch.full((1, n, n), 2.0, dtype=torch.float64))[0]
    assert torch.allclose(twice, found / 2)


def test_options_that_make_no_sense_are_refused():
    for name, options in (("induction", {"half": 40}), ("noise", {"needles": 9}),
                          ("digits", {"patch": 3}), ("burgers", {"points": 60})):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(options))):
            find(name)(**options)
    with pytest.raises(UserError, match="did you mean 'sorting'"):
        find("sortin")


def test_rewriting_asks_for_the_value_written_last():
    task = find("rewriting")(pairs=3, writes=9, keys=5, length=24)
    batch = drawn(task, 16, "test", 0)
    counts = set()
    for row, place, answer in asked(batch):
        told = batch["input_ids"][row, :18].view(-1, 2).tolist()
        key = int(batch["input_ids"][row, place])
        written = [value for k, value in told if k == key]
        counts.add(len(written))
        assert written[-1] == answer
    assert counts == {3}
    assert len(list(asked(batch))) == 3 * 16


def test_swaps_follow_every_item_to_the_first_place():
    task = find("swaps")(items=3, length=10)
    pairs = [(0, 1), (0, 2), (1, 2)]
    for split, length in (("test", 10), ("twice as long", 20)):
        batch = drawn(task, 16, split, 0)
        assert batch["input_ids"].shape == (16, length)
        for tokens, answers in zip(
            batch["input_ids"].tolist(), batch["targets"].tolist(), strict=True
        ):
            row = [0, 1, 2]
            for token, answer in zip(tokens, answers, strict=True):
                i, j = pairs[token]
                row[i], row[j] = row[j], row[i]
                assert row[0] == answer


@pytest.mark.parametrize(("name", "options", "named"), [
    ("rewriting", {"pairs": 5}, "pairs"), ("rewriting", {"length": 20}, "length"),
    ("swaps", {"items": 1}, "items"), ("swaps", {"length": 0}, "length"),
])  # fmt: skip
def test_tasks_of_states_name_wrong_options(name, options, named):
    with pytest.raises(ValueError, match=named):
        find(name)(**options)
