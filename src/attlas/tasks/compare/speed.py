"""Speed: prefill and decode times, each beside the least that this machine could need.

    prefill floor = max(operations / matmul rate, bytes / copy rate)
        operations = 2 · weights · T + 2 · T² · heads · head_dim · layers · density
                                                                              (half the square, ×4)
        bytes      = weights
    decode floor  = (bytes of weights + bytes of cache) / copy rate

The two rates are measured on the spot, in the dtype of the model: a copy of a large buffer (bytes
read + written a second) and a square matrix product. Times are medians of repeated runs of the
method by itself, so that nothing shared flatters it; lower is better. A floor is a bound on any
implementation of this computation, not a goal that PyTorch reaches.

*density*: the share of the prompt's pairs that a method which thins them out reads, by whole blocks, on
average over layers and heads; 1 for all others.

*pays from*: the length from which on a token takes less time than with the full cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from attlas.catalog.registry import mechanism
from attlas.compare.methods import FULL
from attlas.compare.presets import Preset
from attlas.hf.sources import layer_config
from attlas.journal import Line
from attlas.tasks.compare.alone import ALONE, Alone
from attlas.tasks.compare.base import COST, Bench, CompareTask, Context, Metric, Sample
from attlas.tasks.record import Measure, median
from attlas.tasks.roof import Roof


def density(samples: Sequence[tuple[tuple[float, ...], ...]]) -> Measure:
    """The mean over layers and heads, and each head's own mean over the runs."""
    by_head = torch.tensor(samples, dtype=torch.float64).mean(0)
    rows = tuple(tuple(round(x, 5) for x in row) for row in by_head.tolist())
    return Measure(float(by_head.mean()), len(samples), by_head=rows)


@mechanism("speed", paper="")
class Speed(CompareTask):
    """Milliseconds of prefill and of each decoded token."""

    metrics = (
        Metric("prefill_ms", "prefill ms", COST, "lower",
               "reading the context and compressing it, each method by itself", ALONE, median),
        Metric("decode_ms", "decode ms", COST, "lower", "each generated token", ALONE, median,
               digits=1, drawn="picture"),
        Metric("pays_from", "pays from", COST, "lower",
               "tokens of context from which on a generated token takes less time than with the full "
               "cache", drawn=""),
        Metric("density", "density %", COST, "lower",
               "pairs of the context's tokens that attention reads, of those that full attention reads",
               ALONE, density, scale=100.0, digits=1, drawn="picture", thinned=True),
    )  # fmt: skip
    how = (
        "Speed: each method runs by itself, several times in turn; times are medians. The floor is the "
        "larger of operations ÷ matrix-product rate and bytes ÷ copy rate, both measured on this "
        "machine: no program that does this work can be faster here."
    )

    def rounds(self, preset: Preset) -> int:
        """Times vary, so they are taken several times."""
        return preset.repeats

    def samples(self, context: Context, seen: Alone) -> Iterator[Sample]:
        """One prefill and every token of a run."""
        yield "prefill_ms", None, 1e3 * seen.prefill
        if seen.density is not None:
            yield "density", None, seen.density
        for seconds in seen.decode:
            yield "decode_ms", None, 1e3 * seconds

    def floor(
        self, metric: Metric, bench: Bench, length: int, kv_bytes: int, samples: Mapping[str, Any]
    ) -> float | None:
        """See the module."""
        if metric.key == "density":
            return None
        if metric.key == "prefill_ms":
            read = density(samples["density"]).value if "density" in samples else 1.0
            return 1e3 * prefill_floor(bench.model, bench.roof, length, read)
        return 1e3 * decode_floor(bench.model, bench.roof, kv_bytes)

    def derived(self, lines: Sequence[Line], method: str) -> Mapping[str, Measure | str]:
        """The length from which on the method pays; beside methods that read less, what full reads."""
        if method == FULL:
            beside = any(line["metric"] == "density" for line in lines)
            return {"density": Measure(1.0, 1)} if beside else {}
        found = break_even(lines, method)
        return {} if found is None else {"pays_from": found}


def prefill_floor(model: Any, roof: Roof, length: int, density: float = 1.0) -> float:
    """Seconds below which no prefill of `length` tokens that reads such a share of pairs can come."""
    config = model.config.get_text_config(decoder=True)
    width: int = config.num_attention_heads * _head_dim(layer_config(config, 0))
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    # Looking tokens up costs nothing; the head is applied to the last token only.
    tied = head is not None and head.weight is embedding
    weights: int = sum(p.numel() for p in model.parameters()) - embedding.numel()
    if head is not None and not tied:
        weights -= head.weight.numel()
    square = 2 * length**2 * width * config.num_hidden_layers * density
    operations: float = 2 * weights * length + square
    return max(operations / roof.flops_per_second, _weight_bytes(model) / roof.bytes_per_second)


def decode_floor(model: Any, roof: Roof, cache_bytes: int) -> float:
    """Seconds a token below which no decoding with so large a cache can come."""
    return (_weight_bytes(model) + cache_bytes) / roof.bytes_per_second


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


def _head_dim(config: Any) -> int:
    given = getattr(config, "head_dim", None)
    return int(given or config.hidden_size // config.num_attention_heads)


def _weight_bytes(model: Any) -> int:
    return sum(p.nbytes for p in model.parameters())
