"""Interleaved timing: candidates take turns, so that what drifts on the machine touches all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

#: Runs that are queued at once on a GPU, as a model queues them.
QUEUED = 8


def interleaved(
    candidates: Mapping[str, Callable[[], object]], *, rounds: int = 15, device: str = "cpu",
    warm: int = 2, queued: int = QUEUED,
) -> dict[str, float]:  # fmt: skip
    """Median milliseconds of each candidate; every round runs them all, each time in another order."""
    for run in candidates.values():
        for _ in range(warm):
            run()
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(timed(candidates[name], device, queued))
    return {name: statistics.median(t) for name, t in times.items()}


def timed(run: Callable[[], object], device: str, queued: int = QUEUED) -> float:
    """Milliseconds of one run; on a GPU the mean of several queued at once."""
    if torch.device(device).type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(queued):
            run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) / queued
    began = time.perf_counter()
    run()
    return (time.perf_counter() - began) * 1e3
