"""What a task of `attlas compare` is: metrics, the contexts that they are read from, and samples.

    @mechanism("perplexity", paper="")
    class Perplexity(CompareTask):
        metrics = (Metric("perplexity", "perplexity", KEPT, "lower", ..., context=CONTINUED, ...),)

        def samples(self, context, seen): yield "perplexity", None, ...

The plan, the runner, the table and the report ask the task, so a new task is one new file. A *context*
is text that a model reads, and how a method is observed on it; tasks whose metrics name the same
context share its reading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from attlas.catalog import registry
from attlas.catalog.kinds import TASK, Kind
from attlas.compare.methods import Method
from attlas.compare.presets import Preset
from attlas.errors import UnknownName
from attlas.journal import Line
from attlas.options import Configured
from attlas.tasks.record import Measure, pooled_fraction, pooled_share
from attlas.tasks.roof import Roof

#: One observation of a metric: (the metric's key, the depth it belongs to, its value).
Sample = tuple[str, float | None, Any]


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the table; its caption may hold `{lengths}` and `{longest}`."""

    name: str
    caption: str


FOUND = Section("found", "What is found ({lengths} tokens; with 95 % intervals)")
KEPT = Section("kept", "What is kept ({longest} tokens; with 95 % intervals)")
COST = Section("cost", "What it costs ({longest} tokens; floor: the least this machine could need)")
#: In the order in which they are shown, and in which their tasks are run.
SECTIONS = (FOUND, KEPT, COST)


@dataclass(frozen=True, slots=True)
class Bench:
    """The model under test, how much is measured, and what the machine can do."""

    model: Any
    tokenizer: Any
    preset: Preset
    roof: Roof


class Context:
    """Text that a model reads, and how a method is observed on it. One object of each is made.

    Attributes:
        name: in seeds, so that the same texts are drawn whatever else is run.
        title: of its work, as progress shows it.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    def depths(self, preset: Preset) -> tuple[float | None, ...]:
        """One unit of work each; None where depth means nothing."""
        return (None,)

    def asked(self, preset: Preset, depth: float | None) -> tuple[float | None, ...]:
        """The depths of which a unit gives samples."""
        return (depth,)

    def weight(self, length: int) -> float:
        """Rough work of one observation, in tokens of prefill, so that the time left is told well."""
        raise NotImplementedError

    def text(
        self, tokenizer: Any, preset: Preset, length: int, depth: float | None, seed: str
    ) -> Any:
        """What is read, decided by the seed alone.

        Raises:
            UserError: the length is too short for it.
        """
        raise NotImplementedError

    def read(self, bench: Bench, text: Any, methods: Sequence[Method]) -> Any:
        """What all methods share, made once; each is charged its part of the time."""
        raise NotImplementedError

    def observe(self, bench: Bench, read: Any, method: Method, hold: Callable[[Any], int]) -> Any:
        """What one method does with it, for the tasks' `samples`.

        Args:
            bench: what it runs on.
            read: what all methods share.
            method: under test.
            hold: to be told each cache as the method keeps it; gives its bytes.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Metric:
    """A number that a task measures, and a column of the table.

    Attributes:
        key: its name in the results, no other task's.
        title: the column's head, with the unit.
        section: of the table.
        better: "higher" or "lower".
        meaning: one sentence for a reader who knows none of this.
        context: where its samples come from; None where the task derives it from other metrics.
        measure: one number from the samples of a cell.
        pool: one number from the cells of all lengths and depths; None to show the longest length.
        scale: from the metric's own unit to the shown one.
        digits: after the point.
        drawn: "picture": in pareto.png and in the report; "page": in the report; "": nowhere.
        map: caption of its table by depth and length, for shares; empty for none.
        on_cuda: what it means on a GPU, where that is something else.
        thinned: it is measured only of methods that thin out a prompt.
    """

    key: str
    title: str
    section: Section
    better: str
    meaning: str
    context: Context | None = None
    measure: Callable[[Sequence[Any]], Measure] | None = None
    pool: Callable[[Sequence[Line]], Measure] | None = None
    scale: float = 1.0
    digits: int = 0
    drawn: str = "page"
    map: str = ""
    on_cuda: str = ""
    thinned: bool = False

    @property
    def quality(self) -> bool:
        """Whether it says what a method keeps, rather than what it costs."""
        return self.section is not COST


class CompareTask(Configured):
    """A task of `attlas compare`.

    Attributes:
        metrics: what it measures.
        how: how it was measured, for the report; plain text.
        maps: heading and lead of its tables by depth and length; empty without.
    """

    kind: ClassVar[Kind] = TASK
    metrics: ClassVar[tuple[Metric, ...]]
    how: ClassVar[str] = ""
    maps: ClassVar[tuple[str, str] | None] = None

    def rounds(self, preset: Preset) -> int:
        """Texts of each unit; of tasks that share a context the one that asks for most decides."""
        raise NotImplementedError

    def samples(self, context: Context, seen: Any) -> Iterator[Sample]:
        """What an observation says of this task's metrics of that context."""
        raise NotImplementedError

    def floor(
        self, metric: Metric, bench: Bench, length: int, kv_bytes: int, samples: Mapping[str, Any]
    ) -> float | None:
        """The least that this machine could need, in the metric's unit; None where no law is known.

        Args:
            metric: whose number it stands beside.
            bench: what it ran on.
            length: tokens of the context.
            kv_bytes: held by the cache after it.
            samples: of this task's metrics at the same depth, by key.
        """
        return None

    def derived(self, lines: Sequence[Line], method: str) -> Mapping[str, Measure | str]:
        """A method's metrics that have no context of their own, from all finished lines."""
        return {}

    @property
    def contexts(self) -> tuple[Context, ...]:
        """The contexts that its metrics are read from."""
        return tuple(dict.fromkeys(m.context for m in self.metrics if m.context is not None))


def shares(lines: Sequence[Line]) -> Measure:
    """Shares of successes of several cells as one."""
    return pooled_share([(line["value"], line["n"]) for line in lines])


def fractions(lines: Sequence[Line]) -> Measure:
    """Means of numbers in [0, 1] of several cells as one."""
    return pooled_fraction([(line["value"], line["n"], line["sd"] or 0.0) for line in lines])


def known() -> dict[str, CompareTask]:
    """All tasks of `attlas compare` by name, in the order in which they are run."""
    classes: dict[str, Any] = {entry.name: entry.object for entry in registry.entries(TASK)}
    found = [(name, cls) for name, cls in classes.items() if issubclass(cls, CompareTask)]
    found.sort(key=lambda one: (SECTIONS.index(one[1].metrics[0].section), one[0]))
    return {name: cls() for name, cls in found}


def find(name: str) -> CompareTask:
    """The task called `name`.

    Raises:
        UnknownName: with the nearest names.
    """
    tasks = known()
    key = name.strip().lower().replace("_", "-")
    if key not in tasks:
        raise UnknownName("task", name, tasks)
    return tasks[key]
