"""What the machine can do, measured on the spot: copy and matrix-product rates; and its clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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


def copying(device: torch.device) -> tuple[Callable[[], Tensor], int]:
    """(a copy, bytes that it reads and writes)."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes


def multiplying(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], Tensor], int]:
    """(a product of matrices, its operations)."""
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=device).to(dtype)
    return lambda: matrix @ matrix, 2 * size**3


def measure_roof(device: torch.device, dtype: torch.dtype) -> Roof:
    """Measures copy and matmul rates of `device` (well under two seconds)."""
    copy, nbytes = copying(device)
    product, flops = multiplying(device, dtype)
    return Roof(nbytes / _median_time(copy, device), flops / _median_time(product, device))


def _median_time(work: Callable[[], object], device: torch.device) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        start = clock(device)
        work()
        times.append(clock(device) - start)
    return statistics.median(times)
