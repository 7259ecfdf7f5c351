"""Speed: prefill and decode times, each beside the least that this machine could need.

    prefill floor = max(operations / matmul rate, bytes / copy rate)
        operations = 2 · weights · T + 2 · T² · heads · head_dim · layers     (half the square, ×4)
        bytes      = weights
    decode floor  = (bytes of weights + bytes of cache) / copy rate

The two rates are measured on the spot, in the dtype of the model: a copy of a large buffer (bytes
read + written a second) and a square matrix product. Times are medians of repeated runs of the
method by itself, so that nothing shared flatters it; lower is better. A floor is a bound on any
implementation of this computation, not a goal that PyTorch reaches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


def prefill_floor(model: Any, roof: Roof, length: int) -> float:
    """Seconds below which no exact prefill of `length` tokens can come."""
    config = model.config.get_text_config(decoder=True)
    width: int = config.num_attention_heads * _head_dim(config)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    # Looking tokens up costs nothing; the head is applied to the last token only.
    tied = head is not None and head.weight is embedding
    weights: int = sum(p.numel() for p in model.parameters()) - embedding.numel()
    if head is not None and not tied:
        weights -= head.weight.numel()
    square: int = 2 * length**2 * width * config.num_hidden_layers
    operations: int = 2 * weights * length + square
    return max(operations / roof.flops_per_second, _weight_bytes(model) / roof.bytes_per_second)


def decode_floor(model: Any, roof: Roof, cache_bytes: int) -> float:
    """Seconds a token below which no decoding with so large a cache can come."""
    return (_weight_bytes(model) + cache_bytes) / roof.bytes_per_second


def _head_dim(config: Any) -> int:
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _weight_bytes(model: Any) -> int:
    return sum(p.nbytes for p in model.parameters())


def _median_time(work: Callable[[], object], device: torch.device) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        start = clock(device)
        work()
        times.append(clock(device) - start)
    return statistics.median(times)
