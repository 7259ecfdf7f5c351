"""The checks of tasks: what they draw is decided by the seed alone, and they say how they score.

Tasks of `attlas train` are drawn from; those of `attlas compare` are run with full attention and half
a window on a small random Llama whose tokens are bytes.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from attlas.compare.grid import Grid
from attlas.compare.methods import parse_methods
from attlas.compare.presets import Preset
from attlas.compare.units import run_unit
from attlas.contract.measure import Measure, Subject, check, holds
from attlas.tasks.compare.base import Bench, CompareTask, known
from attlas.tasks.roof import Roof
from attlas.tasks.train.base import Task

LENGTH = 512
SMALL = Preset("small", (LENGTH,), (0.2, 0.8), 1, 1, 8, 1, 2, ("full", "streaming-llm(keep=0.5)"))


def trains(subject: Subject) -> bool:
    """Whether `attlas train` trains on it."""
    return inspect.isclass(subject.object) and issubclass(subject.object, Task)


def compares(subject: Subject) -> bool:
    """Whether `attlas compare` compares by it."""
    return inspect.isclass(subject.object) and issubclass(subject.object, CompareTask)


@check("task", when=trains, poisoned=False)
def seeded(subject: Subject) -> Iterator[Measure]:
    """The same generator draws the same batch, another draws another one."""
    task = subject.made()
    first, again, other = (task.draw(torch.Generator().manual_seed(s), 4) for s in (1, 1, 2))
    for name, tensor in first.items():
        yield holds(
            f"{name} again", torch.equal(tensor, again[name]), "the same seed drew other data"
        )
    alike = all(torch.equal(tensor, other[name]) for name, tensor in first.items())
    yield holds("another seed", not alike, "another seed drew the same data")


@check("task", when=trains, poisoned=False)
def sizes_hold(subject: Subject) -> Iterator[Measure]:
    """What is drawn has room in the sizes that the task tells, and something is asked for."""
    task = subject.made()
    for split in ("train", *task.splits):
        batch = task.draw(torch.Generator().manual_seed(1), 4, split)
        yield holds(f"{split} rows", all(len(t) == 4 for t in batch.values()), "not 4 rows")
        yield holds(f"{split} terms", task.terms(batch) > 0, "the loss has no term")
        if "input_ids" in batch:
            longest = batch["input_ids"].shape[1]
            yield holds(f"{split} length", longest <= task.sizes.length, f"{longest} tokens")


@check("task", when=compares, poisoned=False)
def texts_repeat(subject: Subject) -> Iterator[Measure]:
    """The same seed makes the same text, another another one, at every depth."""
    for context in subject.made().contexts:
        for depth in context.depths(SMALL):
            first, again, other = (
                context.text(Bytes(), SMALL, LENGTH, depth, seed) for seed in ("1", "1", "2")
            )
            case = f"{context.name} at depth {depth}"
            yield holds(case, first == again, "the same seed made another text")
            yield holds(f"{case}, another seed", first != other, "another seed made the same text")


@check("task", when=compares)
def cells_agree(subject: Subject) -> Iterator[Measure]:
    """Every metric with a context has a cell, no cell is asked for twice, no key is another task's."""
    task: CompareTask = subject.made()
    keys = Counter(m.key for m in task.metrics)
    yield holds("keys", max(keys.values()) == 1, f"a key stands twice: {keys.most_common(1)}")
    tasks = {**known(), subject.name: task} if subject.registered else {subject.name: task}
    theirs = {m.key: name for name, t in tasks.items() if name != subject.name for m in t.metrics}
    taken = [f"{key} of {theirs[key]}" for key in keys if key in theirs]
    yield holds("keys of others", not taken, f"taken: {taken}")
    for metric in task.metrics:
        fine = metric.better in ("higher", "lower") and metric.drawn in ("picture", "page", "")
        yield holds(
            f"{metric.key} words", fine, f"better {metric.better!r}, drawn {metric.drawn!r}"
        )
        fine = (metric.context is None) == (metric.measure is None)
        yield holds(f"{metric.key} measure", fine, "a context and `measure` go together")
    if subject.registered:
        grid = _grid(subject.name)
        cells = Counter(grid.all_cells())
        yield holds(
            "cells once", max(cells.values()) == 1, f"{cells.most_common(1)} more than once"
        )
        missing = [
            m.key for m in task.metrics
            if m.context and not m.thinned and m.key not in {c.metric for c in cells}
        ]
        yield holds("cells", not missing, f"no cell measures {missing}")


@check("task", when=lambda subject: compares(subject) and subject.registered, poisoned=False)
def measures_finite(subject: Subject) -> Iterator[Measure]:
    """Every cell gets a finite number, within its own interval, of full attention and of a window."""
    grid, bench = _grid(subject.name), Bench(_model(), Bytes(), SMALL, Roof(1e9, 1e9))
    for unit in grid.units():
        with torch.inference_mode():
            outcomes = list(run_unit(grid, bench, unit, grid.methods, lambda: None))
        found = {cell: measure for o in outcomes for cell, measure in o.measures.items()}
        for method in grid.methods:
            for cell in grid.cells(unit, method.label):
                measure = found.get(cell)
                case = f"{cell.metric} of {cell.method} at depth {cell.depth}"
                value = None if measure is None else measure.value
                yield holds(case, value is not None and abs(value) < float("inf"), f"gave {value}")
                if measure is None or measure.low is None or measure.high is None:
                    continue
                inside = measure.low <= measure.value <= measure.high
                yield holds(f"{case}, interval", inside, f"{measure} lies outside of its interval")


@check("task")
def described(subject: Subject) -> Iterator[Measure]:
    """Its docstring says what is asked and how it is scored."""
    docs = inspect.getdoc(inspect.getmodule(subject.object)) or inspect.getdoc(subject.object)
    yield holds("docstring", bool(docs), "no docstring")


class Bytes:
    """A tokenizer whose tokens are bytes."""

    chat_template = None

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        """Ids of a text."""
        return {"input_ids": list(text.encode("latin-1", "replace"))}

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        return bytes(ids).decode("latin-1")

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        """The texts of several."""
        return [self.decode(row) for row in rows]


def _grid(name: str) -> Grid:
    methods = parse_methods(SMALL.methods)
    return Grid("small", methods, (name,), (LENGTH,), SMALL, "cpu", "float32", 0)


@cache
def _model() -> Any:
    """A Llama with random weights that reads bytes."""
    from attlas.hf.models import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
        initializer_range=0.3, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()
