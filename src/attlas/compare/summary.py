"""From cells to a table: one row a method, one column a question that a reader has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from attlas.compare.grid import Grid
from attlas.compare.methods import FULL, Method, written
from attlas.compare.results import Line
from attlas.tasks.record import Measure, pooled_fraction, pooled_share

_MB = 1e-6
_BUDGET_OPTIONS = ("keep", "tokens", "bytes", "bits", "pages")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the table.

    Attributes:
        key: its metric.
        title: its head, with the unit.
        better: "higher" or "lower".
        quality: it says what a method keeps, rather than what it costs.
        meaning: one sentence for a reader who knows none of this.
        scale: from the metric's own unit to the shown one.
        digits: after the point.
    """

    key: str
    title: str
    better: str
    quality: bool
    meaning: str
    scale: float = 1.0
    digits: int = 0


_NEEDLE = "over all lengths and depths"
COLUMNS = (
    Column("single", "needle %", "higher", True,
           "one number hidden in the text, asked for in the prompt: answers with every digit right, "
           + _NEEDLE, 100.0),
    Column("digits", "digits %", "higher", True,
           "the same answers: digits that are right before the first mistake, " + _NEEDLE, 100.0),
    Column("blind", "blind %", "higher", True,
           "the same number, but the question comes after compression, unforeseen, " + _NEEDLE, 100.0),
    Column("several", "several %", "higher", True,
           "four or more numbers hidden, one asked for in the prompt: answers with every digit right, "
           + _NEEDLE, 100.0),
    Column("kl", "KL nats", "lower", True,
           "divergence of the next-token distributions from full attention's, per token", 1.0, 3),
    Column("top1", "top-1 %", "higher", True,
           "tokens at which the most likely next one is the same as full attention's", 100.0),
    Column("perplexity", "perplexity", "lower", True,
           "of the true continuation: how many tokens the model hesitates between", 1.0, 1),
    Column("cache_bytes", "cache MB", "lower", False,
           "keys, values, slot indices and summaries held after the context", _MB, 1),
    Column("read_bytes", "read MB", "lower", False,
           "of these, what one generated token reads", _MB, 1),
    Column("peak_bytes", "peak MB", "lower", False, "", _MB),
    Column("prefill_ms", "prefill ms", "lower", False,
           "reading the context and compressing it, each method by itself"),
    Column("decode_ms", "decode ms", "lower", False, "each generated token", 1.0, 1),
    Column("pays_from", "pays from", "lower", False,
           "tokens of context from which on a generated token takes less time than with the full cache"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Summary:
    """All that the views show.

    Attributes:
        grid: the plan.
        columns: those that were measured.
        table: by method's label and column's key; a word where there is no number, and why.
        lines: every cell.
    """

    grid: Grid
    columns: tuple[Column, ...]
    table: dict[str, dict[str, Measure | str]]
    lines: tuple[Line, ...]

    @property
    def longest(self) -> int:
        """The length at which all but the needles are shown."""
        return max(self.grid.lengths)

    def stamps(self, field: str) -> list[str]:
        """The different machines or versions that stand in the lines, in words."""
        return list(dict.fromkeys(_words(line[field]) for line in self.lines))


def summarize(lines: Sequence[Line], grid: Grid) -> Summary:
    """The table of all finished cells."""
    table: dict[str, dict[str, Measure | str]] = {}
    for method in grid.methods:
        row = table.setdefault(method.label, {})
        for column in COLUMNS:
            chosen = [
                line for line in lines
                if line["method"] == method.label and line["metric"] == column.key
                and (line["task"] == "needle" or line["length"] == max(grid.lengths))
            ]  # fmt: skip
            if chosen:
                row[column.key] = _pooled(column.key, chosen)
        if method.named and (found := break_even(lines, method.label)) is not None:
            row["pays_from"] = found
    shown = tuple(c for c in COLUMNS if any(c.key in row for row in table.values()))
    return Summary(grid, shown, table, tuple(lines))


def meaning(column: Column, summary: Summary) -> str:
    """What a column says, in words that fit the device."""
    if column.key != "peak_bytes":
        return column.meaning
    if summary.grid.device.startswith("cuda"):
        return "the most that PyTorch had allocated at once, weights included"
    return "growth of the process's resident memory during prefill and decode, weights not included"


def break_even(lines: Sequence[Line], method: str) -> Measure | str | None:
    """The length from which on a method decodes faster than the full cache, at all lengths measured.

    Between two lengths the difference of the times is taken for a straight line. "never" where the
    longest is not faster; None where fewer than two lengths were measured.
    """
    times: dict[str, dict[int, float]] = {FULL: {}, method: {}}
    for line in lines:
        if line["metric"] == "decode_ms" and line["status"] == "ok" and line["method"] in times:
            times[line["method"]][line["length"]] = line["value"]
    lengths = sorted(set(times[FULL]) & set(times[method]))
    if len(lengths) < 2:
        return None
    gain = [times[FULL][n] - times[method][n] for n in lengths]
    slower = [i for i, g in enumerate(gain) if g <= 0]
    if not slower:
        return Measure(lengths[0], len(lengths))
    last = slower[-1]
    if last == len(lengths) - 1:
        return "never"
    share = -gain[last] / (gain[last + 1] - gain[last])
    return Measure(lengths[last] + share * (lengths[last + 1] - lengths[last]), len(lengths))


def family(method: Method) -> str:
    """A method without its budgets: what a line in a picture connects."""
    return "+".join(
        written(name, [o for o in options if o[0] not in _BUDGET_OPTIONS])
        for name, options in method.named
    ) or FULL  # fmt: skip


def budget(method: Method) -> str:
    """A method's budgets in a few signs; empty where it has none."""
    found = []
    for _, options in method.named:
        given = dict(options)
        name = next((name for name in _BUDGET_OPTIONS if name in given), None)
        if name is not None:
            share = name == "keep" and isinstance(given[name], float)
            found.append(f"{100 * given[name]:g} %" if share else f"{given[name]} {name}")
    return " + ".join(found)


def shown(column: Column, measure: Measure) -> tuple[str, str]:
    """A number and its interval as text, in the column's unit."""

    def text(value: float) -> str:
        return f"{column.scale * value:.{column.digits}f}"

    if measure.floor is not None:
        return text(measure.value), f"floor {text(measure.floor)}"
    if measure.low is None or measure.high is None or not column.quality:
        return text(measure.value), ""
    return text(measure.value), f"{text(measure.low)}–{text(measure.high)}"


def _pooled(key: str, lines: list[Line]) -> Measure | str:
    """One measure from one or several lines; the status of the first that has no number."""
    failed = next((line["status"] for line in lines if line["status"] != "ok"), None)
    if failed is not None:
        return str(failed)
    if key in ("single", "blind", "several"):
        return pooled_share([(line["value"], line["n"]) for line in lines])
    if key == "digits":
        return pooled_fraction([(li["value"], li["n"], li["sd"] or 0.0) for li in lines])
    line = lines[0]
    return Measure(line["value"], line["n"], line["low"], line["high"], line["floor"], line["sd"])


def _words(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return str(value)
