"""Study: a paper's claim as an experiment, from a seed to rows, from rows to a verdict and a picture.

    @mechanism("my-study", example={"steps": 5})
    class MyStudy(Study):
        claim = "two heads learn it sooner than one"
        set_up = "steps to 99 % of a toy task"
        expects = (Beats("two heads", "one head"),)
        steps: int = option("of the training", default=1000, at_least=1)   # as in the real experiment

        def run(self, seed):
            yield Row("two heads", ..., "steps", "lower")
            yield Row("one head", ..., "steps", "lower")

`attlas study my-study` runs it with all seeds and tells whether the claim holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from attlas.catalog.kinds import STUDY, Kind
from attlas.kinds.expect import Beats, Expectation, NoWorse, Row, Verdict, Within, verdict
from attlas.options import Configured, option

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Beats", "Expectation", "NoWorse", "Row", "Study", "Verdict", "Within"]


class Study(Configured):
    """A claim and its experiment."""

    kind: ClassVar[Kind] = STUDY
    #: Whether every seed gives the same rows.
    deterministic: ClassVar[bool] = False
    #: What the places of rows, `at`, measure.
    axis: ClassVar[str] = ""
    #: Whether it computes on `device`; a study that does not refuses any but the CPU.
    on_gpu: ClassVar[bool] = True

    seeds: int = option("how many seeds decide: 0, 1 and so on", default=3, at_least=1)
    device: str = option("cpu, cuda or cuda:N", default="cpu")

    def setup(self) -> None:
        """Refuse a device that is none, or that it does not compute on."""
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device takes 'cpu', 'cuda' or 'cuda:N', got {self.device!r}")
        if not self.on_gpu and self.device != "cpu":
            raise ValueError(f"device of this study is the CPU only, got {self.device!r}")

    @property
    def claim(self) -> str:
        """The paper's claim, in our words: a class attribute."""
        raise NotImplementedError(f"{type(self).__name__} needs claim = '...'")

    @property
    def set_up(self) -> str:
        """How it is tried and at what sizes, in one line: a class attribute or property."""
        raise NotImplementedError(f"{type(self).__name__} needs set_up = '...'")

    @property
    def expects(self) -> tuple[Expectation, ...]:
        """What decides over the claim; the first is the claim itself."""
        raise NotImplementedError(f"{type(self).__name__} needs expects = (...)")

    def run(self, seed: int) -> Iterable[Row]:
        """The experiment with one seed; PyTorch's generators are seeded with it already."""
        raise NotImplementedError

    def verdict(self, rows: Sequence[Row]) -> Verdict:
        """Whether the claim holds by the rows of all seeds; `attlas.kinds.expect` has the rule."""
        return verdict([one.answer(rows) for one in self.expects])

    def contradicted(self, rows: Sequence[Row]) -> list[Row]:
        """Rows like these that say the opposite; a study with a verdict of its own writes its own."""
        made = list(rows)
        for one in reversed(self.expects):  # the first, which decides, has the last word
            made = one.contradicted(made)
        return made

    def picture(self, rows: Sequence[Row]) -> Figure:
        """The rows of all seeds: a dot each with their mean, or curves where rows have a place."""
        from attlas.view.study import draw

        title = f"{self.claim}\n{self.verdict(rows)}, {self.seeds} seeds"
        return draw(rows, title, self.axis)

    def rows(self, seed: int) -> list[Row]:
        """What `run` gives, seeded and checked; the program's own random state is left alone.

        Raises:
            ValueError: a seed that is no whole number of at least 0; a row that is no finite number,
                or stands there twice.
        """
        import torch

        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed takes a whole number of at least 0, got {seed!r}")
        devices = [torch.device(self.device)] if self.device != "cpu" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            found = [row._replace(value=float(row.value)) for row in self.run(seed)]
        if not found:
            raise ValueError(f"seed {seed} gave no rows")
        for row in found:
            if not math.isfinite(row.value):
                raise ValueError(f"{row.label} of seed {seed} is {row.value}, no finite number")
        if len({row.label for row in found}) < len(found):
            raise ValueError(f"seed {seed} gave several rows of one name and place")
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the rows of a seed, as JSON can hold it."""
        found = {name: value for name, value in self.options.items() if name != "seeds"}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()}
