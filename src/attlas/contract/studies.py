"""The checks of studies: rows repeat with a seed, the verdict follows from rows, the picture is whole."""

from __future__ import annotations

import inspect
import io
import json
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from attlas.contract.measure import Measure, Subject, check, holds, refuses
from attlas.kinds.expect import VERDICTS, Row
from attlas.kinds.study import Study

#: Of each type of option, a value that no option of it takes.
WRONG: dict[type, Any] = {bool: "yes", int: -1, float: float("nan"), str: 7, tuple: ()}


@check("study", poisoned=False)
def repeats(subject: Subject) -> Iterator[Measure]:
    """A seed gives the same rows again, another seed others unless the study is deterministic."""
    study: Study = subject.made()
    first, again, other = (study.rows(seed) for seed in (0, 0, 1))
    yield holds("seed 0 twice", first == again, f"{first} and then {again}")
    names = [row.label for row in first] == [row.label for row in other]
    yield holds("names", names, "another seed measures other things")
    told = "the same" if study.deterministic else "other"
    as_told = (first == other) == study.deterministic
    yield holds("seed 1", as_told, f"another seed should give {told} rows")


@check("study", poisoned=False)
def leaves_no_trace(subject: Subject) -> Iterator[Measure]:
    """The program's own random numbers and default type go on as if nothing had run."""
    state, dtype = torch.get_rng_state(), torch.get_default_dtype()
    subject.made().rows(0)
    yield holds("random state", torch.equal(state, torch.get_rng_state()), "the generator moved")
    yield holds("default type", torch.get_default_dtype() == dtype, "the default type changed")


@check("study", poisoned=False)
def verdict_follows(subject: Subject) -> Iterator[Measure]:
    """Stored rows give the same verdict, in any order of the seeds; contradicting rows the worst."""
    study: Study = subject.made()
    rows = study.rows(0)
    twice = [row for seed in (rows, rows) for row in seed]
    found = study.verdict(twice)
    yield holds("known", found in VERDICTS, f"{found!r} is none of {VERDICTS}")
    stored = [Row(*row) for row in json.loads(json.dumps(twice, allow_nan=False))]
    yield holds("stored", study.verdict(stored) == found, "rows read back give another verdict")
    by_label = sorted(twice, key=lambda row: row.label)
    yield holds("order", study.verdict(by_label) == found, "the order of rows decides")
    opposite = study.contradicted(twice)
    labels = [row.label for row in opposite] == [row.label for row in twice]
    yield holds("contradicting rows", labels, "they measure other things")
    judged = study.verdict(opposite)
    yield holds("contradicted", judged == VERDICTS[-1], f"rows that contradict it give {judged!r}")


@check("study", poisoned=False)
def rows_tell(subject: Subject) -> Iterator[Measure]:
    """Rows are finite numbers with a name, a unit, "" where there is none, and a direction."""
    for row in subject.made().rows(0):  # `rows` itself refuses what is not finite
        yield holds(
            row.label, bool(row.name) and isinstance(row.unit, str), f"no name or unit: {row}"
        )
        yield holds(row.label, row.better in ("higher", "lower"), f"better is {row.better!r}")


@check("study", poisoned=False)
def picture_draws(subject: Subject) -> Iterator[Measure]:
    """The picture of two seeds is drawn, cuts no text, and stays in no list of open figures."""
    study: Study = subject.made()
    figure = study.picture([*study.rows(0), *study.rows(1)])
    packed = io.BytesIO()
    figure.savefig(packed, format="png")
    yield holds("png", packed.getvalue().startswith(b"\x89PNG"), "no picture was written")
    for text in _texts(figure):
        box, page = text.get_window_extent(), figure.bbox
        whole = page.x0 <= box.x0 <= box.x1 <= page.x1 and page.y0 <= box.y0 <= box.y1 <= page.y1
        yield holds("text", bool(whole), f"{text.get_text()!r} is cut")
    pyplot = sys.modules.get("matplotlib.pyplot")
    opened = [] if pyplot is None else [pyplot.figure(n) for n in pyplot.get_fignums()]
    yield holds("closed", figure not in opened, "pyplot still holds the figure")


def _texts(figure: Figure) -> Iterator[Text]:
    """All texts that are drawn; ticks beyond an axis's limits are not."""
    beyond = set()
    for axes in figure.axes:
        for k, axis in enumerate((axes.xaxis, axes.yaxis)):
            low, high = sorted(axis.get_view_interval())
            labels = axis.get_ticklabels(which="both")
            beyond |= {label for label in labels if not low <= label.get_position()[k] <= high}
    for found in figure.findobj(Text):
        drawn = found.get_visible() and found not in beyond
        if drawn and isinstance(found, Text) and found.get_text().strip():
            yield found


@check("study", poisoned=False)
def wrong_options(subject: Subject) -> Iterator[Measure]:
    """An option of the wrong type or range, and a wrong seed, are refused by name."""
    options: Any = subject.object
    for name, option in options.declared_options.items():
        wrong = next((v for kind, v in WRONG.items() if isinstance(option.default, kind)), None)
        if wrong is not None:
            yield refuses(f"{name}={wrong!r}", partial(subject.made, **{name: wrong}), name)
    yield refuses("seed=-1", lambda: subject.made().rows(-1), "seed")


@check("study", poisoned=False)
def described(subject: Subject) -> Iterator[Measure]:
    """It says what is claimed, how it is tried and what it expects, and has a docstring."""
    study: Study = subject.made()
    yield holds("docstring", bool(inspect.getdoc(subject.object)), "no docstring")
    yield holds("claim", bool(study.claim.strip()), "no claim")
    yield holds("set-up", bool(study.set_up.strip()), "no set-up")
    yield holds("expects", all(str(one) for one in study.expects), "an expectation without words")
