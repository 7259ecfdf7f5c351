"""What the machine can do, measured on the spot: copy and matrix-product rates; and its clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

REPEATS = 5


@dataclass(frozen=True, slots=True)
class Roof:
    """What the machine can do: bytes copied and floating-point operations a second."""

    bytes_per_second: float
    flops_per_second: float


def clock(device: torch.device) -> float:
    """Seconds on a steady clock, after all work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """Measures copy and matmul rates of `device` (well under two seconds)."""
    cuda = device.type == "cuda"
    source = torch.ones(2**28 if cuda else 2**24, device=device)
    target = torch.empty_like(source)
    size = 8192 if cuda else 1024
    matrix = torch.randn(size, size, device=device).to(dtype)
    copying = _median_time(lambda: target.copy_(source), device)
    product = _median_time(lambda: matrix @ matrix, device)
    return Roof(2 * source.nbytes / copying, 2 * size**3 / product)


def _median_time(work: Callable[[], object], device: torch.device) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        start = clock(device)
        work()
        times.append(clock(device) - start)
    return statistics.median(times)
