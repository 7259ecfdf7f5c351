"""Memory: bytes that the cache holds, those that a token reads, and the peak of a run.

    cache   bytes of keys, values, slot indices and summaries held after the context was compressed
    read    of these, what one generated token reads
    peak    CUDA: the most that PyTorch had allocated at once, weights included
            CPU:  the most that the process's resident set grew during prefill and decode over what
                  it was before (weights are resident before, so they are not in it)

Lower is better in all. Methods that leave the prefill exact first hold the whole cache and then
free a part of it, layer by layer, so the peak falls less than what is held.
"""

from __future__ import annotations

from collections.abc import Iterator

from attlas.catalog.registry import mechanism
from attlas.compare.presets import Preset
from attlas.tasks.compare.alone import ALONE, Alone
from attlas.tasks.compare.base import COST, CompareTask, Context, Metric, Sample
from attlas.tasks.record import median

_MB = 1e-6


@mechanism("memory", paper="")
class Memory(CompareTask):
    """Bytes held, read and at the peak."""

    metrics = (
        Metric("cache_bytes", "cache MB", COST, "lower",
               "keys, values, slot indices and summaries held after the context", ALONE, median,
               scale=_MB, digits=1, drawn="picture"),
        Metric("read_bytes", "read MB", COST, "lower", "of these, what one generated token reads",
               ALONE, median, scale=_MB, digits=1, drawn="picture"),
        Metric("peak_bytes", "peak MB", COST, "lower",
               "growth of the process's resident memory during prefill and decode, weights not "
               "included", ALONE, median, scale=_MB, drawn="",
               on_cuda="the most that PyTorch had allocated at once, weights included"),
    )  # fmt: skip
    how = (
        "Memory: each method runs by itself; bytes held are counted after the context, bytes read at "
        "the last generated token."
    )

    def rounds(self, preset: Preset) -> int:
        """Bytes do not vary; one run tells them."""
        return 1

    def samples(self, context: Context, seen: Alone) -> Iterator[Sample]:
        """One of each a run."""
        yield "cache_bytes", None, float(seen.held)
        yield "read_bytes", None, float(seen.read)
        yield "peak_bytes", None, float(seen.peak)
