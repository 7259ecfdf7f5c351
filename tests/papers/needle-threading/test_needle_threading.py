"""needle-threading: every clause of the catalogue row's works_when."""

from __future__ import annotations

import json
import re

import pytest

import attlas
from attlas.errors import UserError
from attlas.kinds.system import scores
from attlas.systems.needle_threading import NeedleThreading
from attlas.tasks.threads import MARK, SEVERAL, TASKS, accounting, effective, solve


class Pieces:
    """A tokenizer of words, signs and pairs of digits."""

    chat_template = None

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [len(piece) for piece in re.findall(r"\d{1,2}|[a-f]+|\s+|.", text)]}


def made(tokenizer: object = None, **options: object) -> NeedleThreading:
    system = attlas.make("needle-threading", **{"reader": "solver", "samples": 20, **options})
    system.build(tokenizer=tokenizer)
    return system


def mean(system: NeedleThreading, cell: str, said: list, seed: int = 0) -> float:
    found = scores(system, said, system.data(cell, seed))
    return sum(found) / len(found)


@pytest.mark.parametrize(("size", "lengths"), [(4, (1500,)), (32, (6000,))])
def test_needle_threading_solver_is_always_right_and_guesses_are_not(size, lengths):
    system = made(size=size, lengths=lengths)
    for cell in system.cells:
        inputs = [e.input for e in system.data(cell, 0)]
        assert mean(system, cell, system.predict(inputs)) == 1.0, cell
        pairs = len(json.loads(inputs[0].haystack))
        # Right once in as many as there are, of four at most once more by luck in twenty questions.
        assert mean(system, cell, system.guess(inputs, 0)) < 0.05 + 4 / pairs, cell


def test_needle_threading_guesses_are_right_as_often_as_chance_says():
    system = made(size=4, lengths=(1500,), samples=4000, tasks=("needle",))
    inputs = [e.input for e in system.data("needle 1500", 0)]
    pairs = len(json.loads(inputs[0].haystack))
    chance = 1 / pairs  # standard error: a tenth of it
    assert mean(system, "needle 1500", system.guess(inputs, 0)) == pytest.approx(chance, rel=0.5)


@pytest.mark.parametrize("tokenizer", [None, Pieces()])
def test_needle_threading_generator_is_seeded_and_hits_the_length(tokenizer):
    count = (lambda text: len(tokenizer(text)["input_ids"])) if tokenizer else len
    for size, length in ((3, 700), (4, 1501), (32, 4000)):
        system = made(tokenizer, size=size, lengths=(length,))
        for cell in system.cells:
            examples = system.data(cell, 1)
            assert examples == system.data(cell, 1)
            assert examples != system.data(cell, 2)
            for haystack in {e.input.haystack for e in examples}:
                assert 0.99 * length <= count(haystack) <= length, cell


def test_needle_threading_all_steps_of_a_thread_exist_in_their_direction():
    system = made(size=4, lengths=(1500,), steps=5)
    for task in TASKS:
        for example in system.data(f"{task} 1500", 0):
            known = json.loads(example.input.haystack)
            places = {key: place for place, key in enumerate(known)}
            ends = []
            for key in example.input.keys:
                visited, ways = [], [key]
                while ways and ways[0] in known:
                    # Of the keys that are offered, the one from which a thread goes on longest.
                    here = max(ways, key=lambda way: _depth(known, way))
                    visited.append(here)
                    value = known[here]
                    ways = value if isinstance(value, list) else [value]
                ends.append(ways[0])
                if "thread" in task or task == "branching":
                    assert len(visited) == system.steps
                order = [places[each] for each in visited]
                if task in ("thread-forward", "threads"):
                    assert order == sorted(order)
                if task == "thread-backward":
                    assert order == sorted(order, reverse=True)
            if task == "conditional":
                marked = {value for key, value in known.items() if MARK in key}
                assert example.target == marked
                assert len(marked) == SEVERAL
            else:
                assert tuple(ends) == example.target


def _depth(known: dict, key: str) -> int:
    value = known.get(key)
    if value is None:
        return 0
    return 1 + max(_depth(known, way) for way in (value if isinstance(value, list) else [value]))


def test_needle_threading_branches_end_sooner_than_the_thread():
    system = made(size=4, lengths=(1500,), steps=4, tasks=("branching",))
    for example in system.data("branching 1500", 0):
        known = json.loads(example.input.haystack)
        offered = known[example.input.keys[0]]
        depths = sorted(_depth(known, way) for way in offered)
        assert depths == [1, 3]
        assert solve(example.input) == example.target


def test_needle_threading_effective_context_and_accounting():
    assert effective({256: 0.9, 512: 0.8, 1024: 0.7, 2048: 0.9}, 0.75) == 512
    assert effective({256: 0.5}, 0.75) == 0
    system = made(lengths=(100, 200), tasks=("needle",))
    said = system.conclusions({"needle 100": 1.0, "needle 200": 0.1})
    assert said == ["needle: at least 75% right up to 100 tokens"]
    counted = accounting(Pieces(), '"1234": "ab"')
    assert counted == {"characters": 12, "tokens": 9, "characters_per_token": 12 / 9}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tasks": ("nedle",)}, "did you mean 'needle'"),
        ({"lengths": (0,)}, "lengths must be at least 1"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"size": 33}, "size must be at least 1 and at most 32"),
        ({"steps": 2}, "steps must be at least 3 for branching"),
        ({"threshold": 0}, "threshold must be above 0"),
        ({"reader": "trained"}, "takes tasks="),
    ],
)
def test_needle_threading_mistakes_are_named(options, said):
    with pytest.raises(UserError, match=said):
        made(**options)


def test_needle_threading_what_does_not_fit_is_named():
    with pytest.raises(UserError, match="length 60 is too short for a haystack of thread-forward"):
        made(lengths=(60,), tasks=("thread-forward",)).data("thread-forward 60", 0)
    with pytest.raises(UserError, match="size 1 gives 10 names"):
        made(lengths=(600,), size=1, tasks=("needle",)).data("needle 600", 0)
    reader = attlas.make("needle-threading", tasks=("needle",))
    question = made(tasks=("needle",), lengths=(256,)).data("needle 256", 0)[0].input
    with pytest.raises(UserError, match="call build"):
        reader.predict([question])


def test_needle_threading_small_model_trained_on_one_needle_is_above_95_percent(tmp_path):
    """Measured over seeds 0 to 2: see docs/systems.md; seed 0 alone here."""
    options = {"reader": "trained", "tasks": ("needle",), "lengths": (110,), "size": 2}
    system = made(samples=200, **options)
    system.fit(0)
    inputs = [e.input for e in system.data("needle 110", 0)]
    said = system.predict(inputs)
    assert mean(system, "needle 110", said) > 0.95
    assert mean(system, "needle 110", system.guess(inputs, 0)) < 0.3
    system.save(tmp_path)
    fresh = made(samples=200, **options)
    fresh.load(tmp_path)
    assert fresh.predict(inputs) == said
    with pytest.raises(UserError, match="was saved by needle-threading"):
        made(samples=10, **options).load(tmp_path)


def test_needle_threading_smollm2_loses_needles_with_length_and_threads_sooner(smollm2):
    """Of 108 questions over three seeds 44 % were right at 128 tokens, 6 % at 1024; 4 % of threads."""
    model, tokenizer = smollm2
    system = attlas.make(
        "needle-threading",
        tasks=("needle", "thread-forward"),
        lengths=(128, 1024),
        samples=12,
        asks=12,
    )
    system.build(model, tokenizer)
    found = {}
    for cell in ("needle 128", "needle 1024", "thread-forward 128"):
        examples = system.data(cell, 2)
        count = len(tokenizer(examples[0].input.haystack)["input_ids"])
        length = int(cell.split()[1])
        assert 0.99 * length <= count <= length
        found[cell] = mean(system, cell, system.predict([e.input for e in examples]), 2)
    assert found["needle 128"] > found["needle 1024"]
    assert found["needle 128"] > found["thread-forward 128"]
