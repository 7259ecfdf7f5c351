"""Interleaved timing and results with their provenance; what all benchmarks share."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

from attlas.bench.timing import QUEUED, interleaved, timed
from attlas.tasks.roof import clock

__all__ = ["interleaved", "paired_ratio", "save", "show", "spent", "stepped"]

RESULTS = Path(os.environ.get("ATTLAS_BENCH_OUT", Path(__file__).parent / "results"))

def paired_ratio(
    ours: Callable[[], object], theirs: Callable[[], object], *, rounds: int, device: str = "cpu",
    queued: int = QUEUED,
) -> dict[str, float]:  # fmt: skip
    """Medians, and the median over rounds of ours/theirs timed back to back in alternating order.

    The ratio of pairs cancels drift that a ratio of medians keeps.
    """
    for run in (ours, theirs):
        run()
    pairs = _in_turns(lambda run: timed(run, device, queued), ours, theirs, rounds)
    return {
        "ours_ms": statistics.median(a for a, _ in pairs),
        "theirs_ms": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
    }


def spent(
    ours: Callable[[], object], theirs: Callable[[], object], *, rounds: int, calls: int = 100
) -> dict[str, float]:
    """Microseconds of this process for a call whose tensors hold next to nothing: what a GPU would wait
    for. The median over rounds, in which both take turns; `above` is that of the differences.

    Time of the processor, not of the clock, since other processes take their turns too; one thread, as
    two would wait for each other.
    """

    def one(run: Callable[[], object]) -> float:
        began = time.process_time()
        for _ in range(calls):
            run()
        return (time.process_time() - began) / calls * 1e6

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one(ours), one(theirs)
    pairs = _in_turns(one, ours, theirs, rounds)
    torch.set_num_threads(threads)
    return {
        "ours_us": statistics.median(a for a, _ in pairs),
        "theirs_us": statistics.median(b for _, b in pairs),
        "above_us": statistics.median(a - b for a, b in pairs),
    }


def _in_turns(
    one: Callable[[Callable[[], object]], float],
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rounds: int,
) -> list[tuple[float, float]]:
    """(ours, theirs) of each round, measured back to back, each first in every second one."""
    pairs = []
    for turn in range(rounds):
        if turn % 2:
            a, b = one(ours), one(theirs)
        else:
            b, a = one(theirs), one(ours)
        pairs.append((a, b))
    return pairs


def stepped(step: Callable[[], object], steps: int, device: torch.device) -> list[float]:
    """Milliseconds of each of so many steps, alone on the device."""
    times = [clock(device)]
    for _ in range(steps):
        step()
        times.append(clock(device))
    return [1e3 * (b - a) for a, b in pairwise(times)]


def save(name: str, device: str, rows: list[dict[str, object]]) -> None:
    """Write the rows with what they were measured on."""
    import transformers

    RESULTS.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    record = {
        "machine": {
            "device": gpu or platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "command": "python " + " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "results": rows,
    }
    path = RESULTS / f"{name}-{device}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path.name}", flush=True)


def show(row: dict[str, object]) -> dict[str, object]:
    """Print a row as it comes, and give it back."""
    print(
        "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()),
        flush=True,
    )
    return row
