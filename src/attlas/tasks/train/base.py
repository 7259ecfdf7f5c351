"""What a task is: a generator of batches, a loss and a score.

    @task("reversing", needs="decoder")
    class Reversing(Task):
        count: int = option("symbols of a string", default=12, at_least=2)

The registry finds the files of this package, so a new task is one new file. Sums and counts,
rather than means, let a batch be split over processes and accumulated parts without changing the
loss: every part divides its sum by the count of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from attlas.catalog import registry
from attlas.catalog.kinds import LAYER, MODULE, TASK, Kind
from attlas.errors import UnknownName
from attlas.options import Configured

#: What the model reads, and `targets`, all with the rows first.
Batch = dict[str, Tensor]
T = TypeVar("T", bound="type[Task]")

#: Targets that nobody asks for.
IGNORED = -100
#: The model types that a task may need.
KINDS = ("decoder", "vit", "seq2seq", "operator", "convnet")


@dataclass(frozen=True, slots=True)
class Score:
    """How a task is judged.

    Attributes:
        title: its name with the unit, as tables show it.
        better: "higher" or "lower".
        scale: from the task's own unit to the shown one.
        digits: after the point.
    """

    title: str = "accuracy %"
    better: str = "higher"
    scale: float = 100.0
    digits: int = 1


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a model must have room for.

    Attributes:
        outputs: classes, or numbers, given at every position.
        length: the most positions that any split has.
        inputs: numbers read at every position; 0 where tokens are read.
        source: tokens of the source's vocabulary, for sequences to sequences.
        image: (channels, height and width, of a patch, 0 where there are none), for images.
    """

    outputs: int
    length: int
    inputs: int = 0
    source: int = 0
    image: tuple[int, int, int] = (0, 0, 0)


class Task(Configured):
    """A task of `attlas train`.

    Attributes:
        name: the name it is registered under.
        needs: the type of model, one of KINDS.
        judged: how it is scored.
        best: the score that nothing can beat, in the task's own unit; None where it is not known.
        yardstick: what `best` rests on, or what to hold a score against where there is none.
        splits: names of what is tested, the one that learning curves show first.
    """

    kind: ClassVar[Kind] = TASK
    name: ClassVar[str]
    needs: ClassVar[str]
    judged: ClassVar[Score] = Score()
    best: ClassVar[float | None] = 1.0
    yardstick: ClassVar[str] = "every answer is determined by the input"

    @property
    def trains(self) -> Kind:
        """The kind of mechanism that its model is built of."""
        return MODULE if self.needs == "convnet" else LAYER

    @property
    def splits(self) -> tuple[str, ...]:
        """What is tested."""
        return ("test",)

    @property
    def sizes(self) -> Sizes:
        """What a model must have room for."""
        raise NotImplementedError

    def draw(self, rng: Generator, rows: int, split: str = "train") -> Batch:
        """A batch, decided by `rng` alone."""
        raise NotImplementedError

    def terms(self, batch: Batch) -> int:
        """How many terms the loss of a batch has; its targets unless overridden."""
        return int((batch["targets"] != IGNORED).sum())

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Sum of what is minimised; cross-entropy of the targets unless overridden."""
        return F.cross_entropy(
            output.reshape(-1, output.shape[-1]).float(),
            batch["targets"].flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )

    def score(self, output: Tensor, batch: Batch) -> tuple[float, int]:
        """Sum and count of what is shown; right answers among the targets unless overridden."""
        targets = batch["targets"]
        asked = targets != IGNORED
        right = (output.argmax(-1) == targets) & asked
        return float(right.sum()), int(asked.sum())


def task(name: str, needs: str) -> Callable[[T], T]:
    """Register a task under `name`; `needs` is the type of model that it trains."""
    if needs not in KINDS:
        raise ValueError(f"needs must be one of {KINDS}, got {needs!r}")

    def register(cls: T) -> T:
        cls.name, cls.needs = name, needs
        return registry.mechanism(name, paper="")(cls)

    return register


def known() -> dict[str, type[Task]]:
    """All tasks of `attlas train` by name."""
    tasks: dict[str, Any] = {entry.name: entry.object for entry in registry.entries(TASK)}
    return {name: task for name, task in tasks.items() if issubclass(task, Task)}


def find(name: str) -> type[Task]:
    """The task called `name`.

    Raises:
        UnknownName: with the nearest names.
    """
    key = name.strip().lower().replace("_", "-")
    if key not in known():
        raise UnknownName("task", name, known())
    return known()[key]


def integers(rng: Generator, low: int, high: int, *shape: int) -> Tensor:
    """Whole numbers in [low, high)."""
    return torch.randint(low, high, shape, generator=rng)


def distinct(rng: Generator, among: int, rows: int, count: int) -> Tensor:
    """`count` different whole numbers below `among` in every row, in random order."""
    return torch.rand(rows, among, generator=rng).argsort(-1)[:, :count]


def next_tokens(tokens: Tensor, asked: Tensor) -> Batch:
    """A batch that reads all tokens but the last and is asked for the next one where `asked`.

    `asked` says for every token whether it is to be predicted.
    """
    targets = tokens.masked_fill(~asked, IGNORED)
    return {"input_ids": tokens[:, :-1], "targets": targets[:, 1:]}
