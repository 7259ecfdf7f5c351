"""Every registered layer beside the fastest SDPA softmax layer of the same shape.

Forward and forward+backward at three lengths, one decoded token over two cache lengths; times, the
ratio of times, the ratio of operations, and peak memory. `--table` writes benchmarks/mechanisms.md from
results that are there.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from functools import cache as remembered
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from attlas.catalog import registry
from attlas.catalog.kinds import LAYER
from common import QUEUED, RESULTS, paired_ratio, save, show
from speed_table import table

#: What a mechanism needs to have the same width as the softmax layer, or what its claim is about.
OPTIONS: dict[str, dict[str, Any]] = {
    "differential-transformer": {"heads": 8},
    "dint-transformer": {"heads": 8},
    "shared-diff-transformer": {"heads": 8},
    "grouped-query-attention": {"kv_heads": 4},
    "sparse-query-attention": {"variant": "extreme"},
    "gmm-attention": {"heads": 1},
    "dynamic-convolution-attention": {"heads": 1},
    "luong-attention": {"heads": 1},
    "mega": {"heads": 1},
    "mega-chunk": {"heads": 1},
}
#: Rows beside the registered layers': a layer with options that cost as much as a mechanism.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax, T5 biases": ("softmax", {"position": "t5"}),
}
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PROMPT = 17  # tokens of the prompt from which a long cache is blown up; no other axis is as long


class Bare(nn.Module):
    """The softmax layer that one writes by hand, on one SDPA backend."""

    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal, self.backend = heads, causal, "math"
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor, slots: tuple[Tensor, Tensor] | None = None) -> Tensor:
        q, k, v = (self.split(p(x)) for p in (self.q, self.k, self.v))
        if slots is not None:
            for slot, new in zip(slots, (k, v), strict=True):
                slot[:, :, -1:] = new
            k, v = slots
        with sdpa_kernel(BACKENDS[self.backend]):
            out = scaled_dot_product_attention(q, k, v, is_causal=self.causal and slots is None)
        return self.o(out.transpose(1, 2).flatten(2))


class Bench:
    """Sizes, device and the baselines that were found fastest."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device, self.rounds = options, options.device, options.rounds
        self.dim, self.heads = options.dim, options.dim // options.head_dim
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.tokens = options.tokens
        self.fastest: dict[tuple[int, bool, str], str] = {}

    def batch(self, length: int) -> int:
        """As many rows as give `tokens` tokens, so that short inputs keep the device busy too."""
        return max(1, self.tokens // length)

    def layer(self, name: str, length: int, causal: bool = True) -> nn.Module:
        """The mechanism at the benchmark's width, causal where it can be."""
        name, given = VARIANTS.get(name, (name, {}))
        entry = registry.find(name)
        options = {"dim": self.dim, "heads": self.heads, **OPTIONS.get(name, {}), **given}
        if name in ("super-attention", "factored-attention"):  # parameters of a fixed size
            options["length"] = max(1024, length + 1)
        if name == "coulgat":
            options["nodes"] = length
        causal = causal and entry.object.supports.causal
        made = registry.make(name, causal=causal, **options)
        return made.to(self.device, self.dtype)

    def bare(self, length: int, causal: bool, what: str) -> Bare:
        """The softmax layer on the backend that is fastest for this work, measured once."""
        layer = Bare(self.dim, self.heads, causal).to(self.device, self.dtype)
        if self.device != "cuda":
            return layer
        if (length, causal, what) in self.fastest:
            layer.backend = self.fastest[length, causal, what]
            return layer
        times = {}
        for backend in ("cudnn", "flash", "efficient"):
            layer.backend = backend
            work = self.work(layer, length, what)
            times[backend] = paired_ratio(work, work, rounds=5, device=self.device)["ours_ms"]
        layer.backend = min(times, key=times.__getitem__)
        self.fastest[length, causal, what] = layer.backend
        return layer

    def work(self, layer: nn.Module, length: int, what: str) -> Callable[[], object]:
        """One run of what is timed."""
        if what == "decode":
            return self.captured(self.step(layer, length))
        x = torch.randn(self.batch(length), length, self.dim, device=self.device, dtype=self.dtype)
        if what == "forward":
            layer.eval()

            def forward() -> None:
                with torch.no_grad():
                    layer(x)

            return forward
        layer.train()
        x.requires_grad_()

        def both() -> None:
            layer(x).sum().backward()
            layer.zero_grad(set_to_none=True)
            x.grad = None

        return both

    def step(self, layer: nn.Module, length: int) -> Callable[[], object]:
        """One decoded token over a cache of `length` tokens, written in place as a server's is."""
        layer.eval()
        x = torch.randn(1, 1, self.dim, device=self.device, dtype=self.dtype)
        if isinstance(layer, Bare):
            shape = (1, self.heads, length + 1, self.dim // self.heads)
            slots = tuple(torch.randn(shape, device=self.device, dtype=self.dtype) for _ in "kv")
            return lambda: layer(x, slots)
        cache = long_cache(layer, length, self)

        def step() -> None:
            cache.layers[0].rewind()
            layer(x, cache=cache)

        return step

    def captured(self, step: Callable[[], object]) -> Callable[[], object]:
        """The step as a CUDA graph, since at one token Python's launches would be all that is timed."""

        def plain() -> None:
            with torch.no_grad():
                step()

        plain.captured = False
        if self.device != "cuda":
            return plain
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                plain()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                plain()
        except (
            Exception
        ) as error:  # a step that waits for the host cannot be captured: run it plainly
            print(f"    not captured: {type(error).__name__}: {str(error)[:120]}", flush=True)
            torch.cuda.synchronize()
            return plain

        def replay() -> None:
            graph.replay()

        replay.captured = True
        return replay


def long_cache(layer: Any, length: int, bench: Bench) -> Any:
    """A cache as after `length` tokens: that of a short prompt, its time axes made long."""
    cache = layer.init_cache()
    prompt = torch.randn(1, PROMPT, bench.dim, device=bench.device, dtype=bench.dtype)
    with torch.no_grad():
        layer(prompt, cache=cache)
    held = cache.layers[0]
    if held.keys is None:  # states alone, which no length changes
        before = dict(held.states)

        def again() -> None:
            held.states, held.seen = dict(before), length

        held.rewind = again
        return cache

    def longer(t: Tensor, by: int) -> Tensor:
        shape = [length + by if size == PROMPT else size for size in t.shape]
        return torch.randn(shape, device=t.device).to(t.dtype) if shape != list(t.shape) else t

    keys, values = longer(held.keys, 1), longer(held.values, 1)
    states = {name: longer(state, 0) for name, state in getattr(held, "states", {}).items()}

    def update(k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for slot, new in ((keys, k), (values, v)):
            slot[:, :, -1:] = new
        held.now = length + 1
        return keys, values

    def rewind() -> None:
        held.now = length
        if states:
            held.states = dict(states)

    held.update, held.get_seq_length, held.rewind = update, lambda: held.now, rewind
    rewind()
    return cache


@remembered
def operations(bench: Bench, name: str) -> tuple[float, float]:
    """(a, b) of a mechanism's forward operations a·n + b·n², counted at two lengths on the host."""
    counts = []
    for n in (512, 1024):
        if name == "bare":
            layer: nn.Module = Bare(bench.dim, bench.heads, False)
        else:
            host = Bench(argparse.Namespace(**{**vars(bench.options), "device": "cpu"}))
            try:  # without a mask, since routes differ in how many hidden pairs they skip
                layer = host.layer(name, n, causal=False)
            except ValueError:
                layer = host.layer(name, n)
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            layer(torch.randn(1, n, bench.dim))
        counts.append(counter.get_total_flops())
    b = (counts[1] - 2 * counts[0]) / (1024**2 - 2 * 512**2)
    return (counts[0] - b * 512**2) / 512, b


def cells(bench: Bench, name: str, lengths: list[int], caches: list[int]) -> list[dict[str, Any]]:
    """All measurements of one mechanism; one that does not fit or fails says so and ends nothing."""
    thing = registry.find(VARIANTS.get(name, (name, {}))[0]).object
    rows = []
    work = [(what, n) for n in lengths for what in ("forward", "forward+backward")]
    work += [("decode", n) for n in caches if thing.supports.causal]
    for what, n in work:
        row: dict[str, Any] = {"name": name, "what": what, "length": n}
        needs = too_much(rows, what, n, bench)
        if needs:
            rows.append(show({**row, "failed": f"would need about {needs:.0f} GiB"}))
            continue
        try:
            rows.append(show({**row, **measured(bench, name, what, n)}))
        except Exception as error:  # one mechanism's failure is its own row
            why = "out of memory" if "out of memory" in str(error).lower() else str(error)[:200]
            rows.append(show({**row, "failed": f"{type(error).__name__}: {why}"}))
        finally:
            release()
    return rows


def measured(bench: Bench, name: str, what: str, n: int) -> dict[str, Any]:
    """Times of the mechanism and of the softmax layer, in turns; peak memory of one run."""
    layer = bench.layer(name, n)
    bare = bench.bare(n, bool(getattr(layer, "causal", False)), what)
    ours = bench.work(layer, n, what)
    theirs = bench.work(bare, n, what)
    ours()
    peak = 0.0
    if bench.device == "cuda":
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        ours()
        peak = (torch.cuda.max_memory_allocated() - held) / 2**30
    slow = _milliseconds(ours, bench.device) > 10
    rounds, queued = (3, 2) if slow else (bench.rounds, QUEUED)
    timed = paired_ratio(ours, theirs, rounds=rounds, device=bench.device, queued=queued)
    return {
        "batch": 1 if what == "decode" else bench.batch(n), "law": type(layer).supports.memory,
        "backend": bare.backend, "peak_gib": peak, "captured": getattr(ours, "captured", None), **timed,
    }  # fmt: skip


def _milliseconds(run: Callable[[], object], device: str) -> float:
    """One run, roughly, to choose how many to time."""
    return paired_ratio(run, run, rounds=1, device=device, queued=1)["ours_ms"]


def too_much(rows: list[dict[str, Any]], what: str, n: int, bench: Bench) -> float:
    """GiB that a run would need by the square law from a shorter one, if more than the device has."""
    if bench.device != "cuda":
        return 0.0
    known = [
        r for r in rows if r["what"] == what and r.get("peak_gib") and r.get("law") == "quadratic"
    ]
    if what == "decode" or not known:
        return 0.0
    last = known[-1]
    scale = (n / last["length"]) ** 2 * bench.batch(n) / bench.batch(last["length"])
    needs = last["peak_gib"] * scale
    return needs if needs > 0.9 * torch.cuda.get_device_properties(0).total_memory / 2**30 else 0.0


def release() -> None:
    """Give memory back between cells."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def agree(name: str) -> str:
    """The contract's check that an accelerator gives what the host gives."""
    from attlas.contract.measure import subject_of
    from attlas.contract.run import _judged, checks_of

    subject = subject_of(VARIANTS.get(name, (name, {}))[0])
    one = next(c for c in checks_of(subject) if c.name == "devices")
    result = _judged(subject, one, subject.expected_failures.get("devices"))
    return result.status if result.status == "passed" else f"{result.status}: {result.reason}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=16384, help="in a batch of short inputs")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--caches", type=int, nargs="+", default=[8192, 65536])
    parser.add_argument("--names", nargs="*", help="these alone; the others' rows are kept")
    parser.add_argument(
        "--table", action="store_true", help="only count operations and write the table"
    )
    options = parser.parse_args()
    path = RESULTS / f"mechanisms-{options.device}.json"
    bench = Bench(options)
    if options.table:
        record = json.loads(path.read_text())
        count(bench, record["results"])
        path.write_text(json.dumps(record, indent=1) + "\n")
    else:
        layers = [entry.name for entry in registry.entries(LAYER)]
        names = options.names or [*layers, *VARIANTS]
        kept = json.loads(path.read_text())["results"] if options.names and path.exists() else []
        rows = [row for row in kept if row["name"] not in names]
        for name in names:
            rows += one(bench, name, options)
            save("mechanisms", options.device, rows)
    (path.parent.parent / "mechanisms.md").write_text(table(path))


def one(bench: Bench, name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One mechanism: does it agree across devices, how many operations, how long."""
    agrees = agree(name) if bench.device == "cuda" else "not asked"
    rows = cells(bench, name, options.lengths, options.caches)
    for row in rows:
        row["agrees"] = agrees
    return rows


def count(bench: Bench, rows: list[dict[str, Any]]) -> None:
    """Put the ratio of operations into the rows; counted on the host, so that no device waits."""
    plain = operations(bench, "bare")
    for name in dict.fromkeys(row["name"] for row in rows if row.get("operations") is None):
        try:
            ours = operations(bench, name)
        except Exception as error:
            print(f"    {name}: operations not counted: {error}", flush=True)
            continue
        for row in rows:
            if row["name"] == name and row["what"] != "decode":
                n = row["length"]
                share = (ours[0] * n + ours[1] * n * n) / (plain[0] * n + plain[1] * n * n)
                row["operations"] = share


if __name__ == "__main__":
    main()
