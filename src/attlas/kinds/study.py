"""Study: a paper's claim as an experiment, from a seed to rows, from rows to a verdict and a picture.

    @mechanism("my-study", example={"steps": 5})
    @dataclass(frozen=True)
    class MyStudy(Study):
        claim = "two heads learn it sooner than one"
        set_up = "steps to 99 % of a toy task"
        expects = (Beats("two heads", "one head"),)
        steps: int = 1000                     # an option, with the value of the real experiment

        def run(self, seed):
            yield Row("two heads", ..., "steps", "lower")
            yield Row("one head", ..., "steps", "lower")

`attlas study my-study` runs it with all seeds and tells whether the claim holds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from attlas.catalog.kinds import STUDY, Kind
from attlas.kinds.expect import Beats, Expectation, NoWorse, Row, Verdict, Within, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Beats", "Expectation", "NoWorse", "Row", "Study", "Verdict", "Within"]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A claim and its experiment; subclasses are frozen dataclasses whose fields are its options.

    Whole-number options are at least 1 (at least 0 where 0 is the default), other numbers finite.

    Attributes:
        deterministic: whether every seed gives the same rows.
        axis: what the places of rows, `at`, measure.
        on_gpu: whether it computes on `device`; a study that does not refuses any but the CPU.
        seeds: how many seeds decide, 0, 1, ...
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: an option of the wrong type or range, by its name.
    """

    kind: ClassVar[Kind] = STUDY
    deterministic: ClassVar[bool] = False
    axis: ClassVar[str] = ""
    on_gpu: ClassVar[bool] = True

    seeds: int = 3
    device: str = "cpu"

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
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "seeds"}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()}

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(field.name, getattr(self, field.name), field.default)
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device takes 'cpu', 'cuda' or 'cuda:N', got {self.device!r}")
        if not self.on_gpu and self.device != "cpu":
            raise ValueError(f"device of this study is the CPU only, got {self.device!r}")


def _check(name: str, value: Any, default: Any) -> None:
    """Refuse a value that is not of its default's type, or a size below 1.

    Raises:
        ValueError: naming the option.
    """
    if isinstance(default, tuple):
        if not isinstance(value, tuple | list) or not value:
            raise ValueError(f"{name} takes one or more values such as {default!r}, got {value!r}")
        for each in value:
            _check(f"each of {name}", each, default[0])
    elif isinstance(default, bool | str):
        if not isinstance(value, type(default)):
            raise ValueError(f"{name} takes {type(default).__name__}, got {value!r}")
    elif isinstance(default, int):
        least = min(default, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} takes a whole number of at least {least}, got {value!r}")
    elif isinstance(default, float) and (
        isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    ):
        raise ValueError(f"{name} takes a finite number, got {value!r}")
