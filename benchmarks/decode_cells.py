"""What decode.py times: caches of every kind, and one step over each as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attlas.bench.steps import SHARE, Step, still
from attlas.ops.decode import decode
from attlas.ops.pages import best_pages, page_bounds, page_scores
from attlas.ops.quantize import Codes, encode
from attlas.ops.segments import Coded, Dense, Listed, Ragged
from common import interleaved, show

HEADS, KV_HEADS, WIDTH = 32, 8, 128
DEVICE, DTYPE = "cuda", torch.bfloat16
GROUP = 128  # tokens of a key's step
FRESH, MOST = 200e6, 64  # bytes and copies after which a level-2 cache holds nothing of the first
BACKENDS = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa": None,
}
EAGER = ("sdpa cudnn", "sdpa flash", "dense", "pages of 32", "coded 4")


def copies_of(nbytes: int) -> int:
    """How many caches of so many bytes are taken in turn."""
    return max(1, min(MOST, -int(-FRESH // nbytes)))


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def dense(k: Tensor, v: Tensor) -> Step:
    return still(Dense(k, v))


def ragged(k: Tensor, v: Tensor) -> Step:
    """Half of the slots, by head from a quarter to three quarters of them."""
    pair, slots = k.shape[:2], k.shape[2]
    drawn = torch.rand(pair) * 0.5 + 0.25
    lengths = (drawn / drawn.mean() * slots / 2).long().clamp(1, slots)
    offsets = lengths.flatten().cumsum(0).view(pair) - lengths
    flat_k, flat_v = (
        torch.cat([x[b, h, : lengths[b, h]] for b in range(pair[0]) for h in range(pair[1])])
        for x in (k, v)
    )
    longest = int(lengths.max())
    return still(Ragged(flat_k, flat_v, offsets.to(DEVICE), lengths.to(DEVICE), longest))


def tokens(k: Tensor, v: Tensor) -> Step:
    """Any 1/SHARE of the tokens, ascending, by key head."""
    order = torch.rand(k.shape[:3], device=DEVICE).argsort(-1)
    return still(Listed(k, v, order[..., : k.shape[2] // SHARE].sort(-1).values.int()))


def in_bits(x: Tensor, bits: int, **options: Any) -> Codes:
    """Codes of x, made row by row, since all of them at once in float32 would not fit."""
    rows = [encode(row, bits, **options) for row in x.split(1)]
    return rows[0].with_tensors(
        {name: torch.cat([row.tensors[name] for row in rows]) for name in rows[0].tensors}
    )


def coded(k: Tensor, v: Tensor, bits: int, per_channel: bool = True) -> Step:
    """Keys with a step per channel in groups of tokens, or per token; values per token."""
    options = {"token_group": GROUP, "channel_group": 1} if per_channel else {}
    return still(Coded(in_bits(k, bits, **options), in_bits(v, bits)))


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The run as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Cell:
    """One batch and length: caches, made when they are needed, and what is timed over them."""

    def __init__(self, batch: int, keys: int) -> None:
        self.batch, self.keys = batch, keys
        self.q = random(batch, HEADS, 1, WIDTH)
        self.caches: list[tuple[Tensor, Tensor]] = []
        self.runs: dict[str, Callable[[], object]] = {}
        self.copies: dict[str, int] = {}
        self.nbytes: dict[str, int] = {}
        self.failed: list[dict[str, object]] = []
        self.kept: list[Callable[[], object]] = []

    def cache(self, n: int) -> tuple[Tensor, Tensor]:
        while len(self.caches) <= n:
            shape = (self.batch, KV_HEADS, self.keys, WIDTH)
            self.caches.append((random(*shape), random(*shape)))
        return self.caches[n]

    def add(
        self, name: str, nbytes: int, calls: Sequence[Callable[[], object]], eager: bool
    ) -> None:
        """Time the calls, one after the other, as a graph and perhaps without."""

        def run() -> None:
            for call in calls:
                call()

        try:
            self.runs[name] = captured(run)
            if eager:
                self.runs[f"{name}, eager"] = run
        except Exception as error:
            torch.cuda.synchronize()
            self.runs.pop(name, None)
            self.fails(name, error)
            return
        self.kept.append(run)  # a graph does not hold the tensors that it reads
        for key in (name, f"{name}, eager"):
            self.copies[key], self.nbytes[key] = len(calls), nbytes

    def fails(self, name: str, error: Exception) -> None:
        what = f"{type(error).__name__}: {str(error)[:300]}"
        row = {"batch": self.batch, "keys": self.keys, "candidate": name, "error": what}
        self.failed.append(show(row))

    def add_step(self, name: str, make: Callable[[Tensor, Tensor], Step]) -> None:
        """A candidate of ours over as many caches as are more than is cached."""
        try:
            steps = [make(*self.cache(0))]
            copies = copies_of(steps[0].nbytes)
            steps += [make(*self.cache(n)) for n in range(1, copies)]
        except Exception as error:
            self.fails(name, error)
            return
        calls = [partial(self.decoded, step) for step in steps]
        self.add(name, steps[0].nbytes, calls, name in EAGER)

    def decoded(self, step: Step) -> object:
        return decode(self.q, step.segments(self.q), route="triton")

    def add_baselines(self) -> None:
        """SDPA by every backend, and a copy."""
        full = dense(*self.cache(0)).nbytes
        copies = copies_of(full)
        for name, backend in BACKENDS.items():
            calls = [partial(self.sdpa, *self.cache(n), backend) for n in range(copies)]
            self.add(name, full, calls, name in EAGER)
        source = torch.empty(2**28, device=DEVICE, dtype=DTYPE)
        target = torch.empty_like(source)
        self.add("copy", 4 * source.numel(), [lambda: target.copy_(source)], False)

    def sdpa(self, k: Tensor, v: Tensor, backend: SDPBackend | None) -> Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return scaled_dot_product_attention(self.q, k, v, enable_gqa=True)

    def add_parts(self, page: int) -> None:
        """Scoring and choosing alone."""
        copies = copies_of(2 * self.cache(0)[0].nbytes // page)
        bounds = [page_bounds(self.cache(n % len(self.caches))[0], page) for n in range(copies)]
        low, high = bounds[0]
        scores = page_scores(self.q, low, high)
        count = self.keys // page // SHARE
        calls = [partial(page_scores, self.q, *pair) for pair in bounds]
        self.add(f"scores of pages of {page}", low.nbytes + high.nbytes, calls, False)
        choice = [partial(best_pages, scores, count)]
        self.add(f"choice of pages of {page}", scores.nbytes, choice, False)

    def times(self, rounds: int) -> dict[str, float]:
        """Milliseconds of one step of each candidate."""
        found = interleaved(self.runs, rounds=rounds, device=DEVICE) if self.runs else {}
        return {name: time / self.copies[name] for name, time in found.items()}

    def timed(self, rounds: int) -> list[dict[str, object]]:
        """A row for each candidate."""
        ms = self.times(rounds)
        sdpa = min((t for name, t in ms.items() if name in BACKENDS), default=float("nan"))
        rate = {name: self.nbytes[name] / time / 1e9 for name, time in ms.items()}  # TB/s
        rows = [
            {
                "batch": self.batch, "keys": self.keys, "candidate": name, "ms": time,
                "gb": self.nbytes[name] / 1e9, "tb_per_s": rate[name], "times_sdpa": sdpa / time,
                "of_roof": rate[name] / rate.get("copy", float("nan")),
            }
            for name, time in ms.items()
        ]  # fmt: skip
        return [show(row) for row in rows]
