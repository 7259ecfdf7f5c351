"""The checks of tasks: what they draw is decided by the seed alone, and they say how they score."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch

from attlas.contract.measure import Measure, Subject, check, holds
from attlas.tasks.train.base import Task


def trains(subject: Subject) -> bool:
    """Whether `attlas train` trains on it."""
    return inspect.isclass(subject.object) and issubclass(subject.object, Task)


@check("task", when=trains, poisoned=False)
def seeded(subject: Subject) -> Iterator[Measure]:
    """The same generator draws the same batch, another draws another one."""
    task = subject.made()
    first, again, other = (task.draw(torch.Generator().manual_seed(s), 4) for s in (1, 1, 2))
    for name, tensor in first.items():
        yield holds(f"{name} again", torch.equal(tensor, again[name]), "the same seed drew other data")
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


@check("task")
def described(subject: Subject) -> Iterator[Measure]:
    """Its docstring says what is asked and how it is scored."""
    docs = inspect.getdoc(inspect.getmodule(subject.object)) or inspect.getdoc(subject.object)
    yield holds("docstring", bool(docs), "no docstring")
