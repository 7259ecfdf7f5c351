"""What is run for each kind of unit. A unit hands over each method's cells as they are finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from attlas.attach.session import bytes_read, cache_bytes
from attlas.compare.grid import Cell, Grid, Unit
from attlas.compare.methods import Method
from attlas.compare.shared import Reading, attached, forward, stepwise
from attlas.hf.caches import cache_of
from attlas.tasks import fidelity, needle
from attlas.tasks.continuation import continuation
from attlas.tasks.memory import Peak
from attlas.tasks.perplexity import perplexity, surprise
from attlas.tasks.record import Measure, fraction, median, share
from attlas.tasks.speed import Roof, clock, decode_floor, prefill_floor


class OutOfMemory(Exception):
    """The machine had too little memory for what was tried."""


@dataclass(slots=True)
class Outcome:
    """What a unit found for one method.

    Attributes:
        measures: by cell; None where memory ran out.
        seconds: of this method's own work, and its share of what all read together.
        kv_bytes: held by the cache after the context, on average over the contexts.
        reason: why a measure is missing.
    """

    method: Method
    measures: dict[Cell, Measure | None]
    seconds: float
    kv_bytes: int
    reason: str = ""


@dataclass(slots=True)
class Tally:
    """What has been gathered for a method so far."""

    seconds: float = 0.0
    held: list[int] = field(default_factory=list)
    samples: dict[Any, list[Any]] = field(default_factory=dict)
    reason: str = ""

    def add(self, key: Any, *values: Any) -> None:
        """Put samples to those gathered under `key`."""
        self.samples.setdefault(key, []).extend(values)

    @property
    def kv_bytes(self) -> int:
        """Bytes held after the context, on average over the contexts."""
        return round(sum(self.held) / len(self.held)) if self.held else 0


@dataclass(frozen=True, slots=True)
class Bench:
    """The model under test and what it is measured against; `tick` is told of each step done."""

    model: Any
    tokenizer: Any
    grid: Grid
    roof: Roof
    tick: Callable[[], None]


def steps(grid: Grid, unit: Unit, methods: int) -> int:
    """How often a unit ticks."""
    preset = grid.preset
    rounds = {
        "single": preset.needles,
        "several": preset.needles,
        "continuation": preset.contexts,
        "alone": preset.repeats if "speed" in grid.tasks else 1,
    }[unit.kind]
    return rounds * methods


def run_unit(bench: Bench, unit: Unit, methods: Sequence[Method]) -> Iterator[Outcome]:
    """Run a unit for these methods; each is handed over as soon as it is finished."""
    tallies = {method.label: Tally() for method in methods}
    contexts = {
        "single": _needles,
        "several": _needles,
        "continuation": _continuations,
        "alone": _alone,
    }[unit.kind]
    rounds = steps(bench.grid, unit, 1)
    for number in range(rounds):
        seed = f"{bench.grid.seed}/{unit.kind}/{unit.length}/{unit.depth}/{number}"
        going = [method for method in methods if not tallies[method.label].reason]
        for method in contexts(bench, unit, going, tallies, seed):
            bench.tick()
            if number == rounds - 1:
                yield _outcome(bench, unit, method, tallies[method.label])
        for method in methods:
            if method not in going:
                bench.tick()
    for method in methods:
        if tallies[method.label].reason:
            yield _outcome(bench, unit, method, tallies[method.label])


def _outcome(bench: Bench, unit: Unit, method: Method, tally: Tally) -> Outcome:
    cells = bench.grid.cells(unit, method.label)
    measures: dict[Cell, Measure | None] = dict.fromkeys(cells)
    if not tally.reason:
        measures = {cell: _measure(bench, cell, tally) for cell in cells}
    return Outcome(method, measures, tally.seconds, tally.kv_bytes, tally.reason)


def _measure(bench: Bench, cell: Cell, tally: Tally) -> Measure:
    samples, model, roof = tally.samples, bench.model, bench.roof
    if cell.metric == "digits":
        return fraction(samples["digits", cell.depth])
    if cell.task == "needle":
        hits = samples[cell.metric, cell.depth]
        return share(sum(hits), len(hits))
    values = samples[cell.metric]
    if cell.metric == "prefill_ms":
        return median(values, 1e3 * prefill_floor(model, roof, cell.length))
    if cell.metric == "decode_ms":
        return median(values, 1e3 * decode_floor(model, roof, tally.kv_bytes))
    return {
        "kl": fidelity.kl,
        "top1": fidelity.top1,
        "perplexity": perplexity,
        "cache_bytes": median,
        "read_bytes": median,
        "peak_bytes": median,
    }[cell.metric](values)


def _read(
    bench: Bench, context: Sequence[int], methods: Sequence[Method], tallies: dict[str, Tally]
) -> Reading | None:
    """Prefill once for all; each method is charged its share of the time."""
    start = clock(bench.model.device)
    try:
        with memory_watched():
            reading = Reading.of(bench.model, context, methods)
    except OutOfMemory as error:
        for method in methods:
            tallies[method.label].reason = str(error)
        return None
    for method in methods:
        tallies[method.label].seconds += (clock(bench.model.device) - start) / len(methods)
    return reading


def _needles(
    bench: Bench, unit: Unit, methods: Sequence[Method], tallies: dict[str, Tally], seed: str
) -> Iterator[Method]:
    if unit.depth is None:
        hay = needle.several(bench.tokenizer, unit.length, bench.grid.preset.depths, seed)
    else:
        hay = needle.single(bench.tokenizer, unit.length, unit.depth, seed)
    reading = _read(bench, hay.context, methods, tallies)
    if reading is None:
        return
    asked = [reading.extended(key.question) for key in hay.asked]
    for method in methods:
        with _charged(bench, tallies[method.label]) as tally, reading.attached(method):
            for key, prompt in zip(hay.asked, asked, strict=True):
                cache, logits = prompt.fork(method)
                tally.held.append(cache_bytes(cache))
                said = _answer(bench, cache, logits)
                tally.add((unit.kind, key.depth), needle.correct(key, said))
                tally.add(("digits", key.depth), needle.digits(key, said))
                if unit.kind == "single":
                    cache, _ = reading.fork(method)
                    question = torch.tensor([key.question], device=bench.model.device)
                    logits = forward(bench.model, question, cache).logits[:, -1]
                    said = _answer(bench, cache, logits)
                    tally.add(("blind", key.depth), needle.correct(key, said))
        if not tallies[method.label].reason:
            yield method


def _answer(bench: Bench, cache: Any, logits: torch.Tensor) -> str:
    """The greedy answer, until a number has been said, the model ends, or it talks too long."""
    ends = getattr(bench.model.generation_config, "eos_token_id", None)
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    said: list[int] = []
    text = ""
    while len(said) < needle.ANSWER_TOKENS:
        ids = logits.argmax(-1, keepdim=True)
        token = int(ids)
        if token in ends:
            break
        said.append(token)
        text = bench.tokenizer.decode(said)
        if needle.finished(text):
            break
        logits = forward(bench.model, ids, cache).logits[:, -1]
    return text


def _continuations(
    bench: Bench, unit: Unit, methods: Sequence[Method], tallies: dict[str, Tally], seed: str
) -> Iterator[Method]:
    text = continuation(bench.tokenizer, unit.length, bench.grid.preset.continuation, seed)
    reading = _read(bench, text.context, methods, tallies)
    if reading is None:
        return
    fed = torch.tensor([text.fed], device=bench.model.device)
    targets = torch.tensor(text.targets, device=bench.model.device)
    try:
        with memory_watched():
            full = forward(bench.model, fed, reading.prompt.fork(None), logits=0).logits[0]
    except OutOfMemory as error:
        for method in methods:
            tallies[method.label].reason = str(error)
        return
    for method in methods:
        with _charged(bench, tallies[method.label]) as tally, reading.attached(method):
            cache, _ = reading.fork(method)
            tally.held.append(cache_bytes(cache))
            logits = _fed(bench.model, fed, cache, stepwise(reading.parts[method.label]))
            tally.add("kl", *fidelity.divergence(full, logits).tolist())
            tally.add("top1", *fidelity.agreement(full, logits))
            tally.add("perplexity", *surprise(logits, targets).tolist())
        if not tallies[method.label].reason:
            yield method


def _fed(model: Any, fed: torch.Tensor, cache: Any, one_by_one: bool) -> torch.Tensor:
    """Logits behind each of the tokens, fed as they would be generated where that matters."""
    pieces = fed.split(1, dim=1) if one_by_one else (fed,)
    return torch.cat([forward(model, piece, cache, logits=0).logits[0] for piece in pieces])


def _alone(
    bench: Bench, unit: Unit, methods: Sequence[Method], tallies: dict[str, Tally], seed: str
) -> Iterator[Method]:
    """Each method by itself, in turn, so that a machine that grows slower favours none."""
    text = continuation(bench.tokenizer, unit.length, bench.grid.preset.decode, seed)
    device = bench.model.device
    ids = torch.tensor([text.context], device=device)
    for method in methods:
        with _charged(bench, tallies[method.label]) as tally, attached(bench.model, method.parts()):
            peak = Peak(device)
            start = clock(device)
            cache = cache_of(forward(bench.model, ids, None))
            tally.add("prefill_ms", 1e3 * (clock(device) - start))
            tally.held.append(cache_bytes(cache))
            for token in text.fed:
                start = clock(device)
                forward(bench.model, torch.tensor([[token]], device=device), cache)
                tally.add("decode_ms", 1e3 * (clock(device) - start))
            tally.add("peak_bytes", float(peak.bytes()))
            tally.add("cache_bytes", float(tally.held[-1]))
            tally.add("read_bytes", float(bytes_read(cache)))
        if not tallies[method.label].reason:
            yield method


@contextmanager
def _charged(bench: Bench, tally: Tally) -> Iterator[Tally]:
    """Time goes to the tally; memory that runs out becomes its reason."""
    start = clock(bench.model.device)
    try:
        with memory_watched():
            yield tally
    except OutOfMemory as error:
        tally.reason = str(error)
    tally.seconds += clock(bench.model.device) - start


@contextmanager
def memory_watched() -> Iterator[None]:
    """Turn the ways in which memory can run out into one exception, and free what can be freed.

    Raises:
        OutOfMemory: memory ran out inside the block.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error)
        cpu = "can't allocate memory" in said or "not enough memory" in said
        if not (cpu or isinstance(error, (MemoryError, torch.OutOfMemoryError))):
            raise
        reason = said.strip().splitlines()[0] if said.strip() else "not enough memory"
    else:
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise OutOfMemory(reason)
