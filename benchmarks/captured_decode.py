"""A token's time in a model of Llama-8B's shape: captured, eager, by Transformers, and what bounds it.

    python benchmarks/captured_decode.py [--cells 1:8192 1:131072 8:32768] [--small]

Caches are filled with random numbers, as in `model_decode.py`. Each method decodes in turns; a row is
the median of its turns' medians. Beside them: all linear layers alone in a CUDA graph; the bytes of
weights and of what a step reads at the bandwidth of a copy; Transformers' static cache, compiled.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import StaticCache

from attlas.attach import attach
from attlas.compare.methods import parse_method
from attlas.hf.caches import with_cache
from attlas.tasks.roof import measure_roof
from common import save, show, stepped
from model_decode import METHODS, filled, shaped


def linears(model: Any, batch: int) -> Callable[[], Any]:
    """All linear layers on one token each, as a graph."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    given = [torch.randn(batch, m.in_features, dtype=model.dtype, device=model.device) for m in layers]

    def run() -> None:
        for layer, x in zip(layers, given, strict=True):
            layer(x)

    run()
    if model.device.type != "cuda":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return lambda: (graph.replay(), given)  # what the graph reads must live as long as it


class Decoding:
    """One method that decodes, greedily, from a cache of its own."""

    def __init__(self, model: Any, method: str, batch: int, tokens: int) -> None:
        self.model = model
        self.parts = parse_method(method).parts()
        self.cache = filled(model, self.parts, batch, tokens)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        self.ids = torch.ones(batch, 1, dtype=torch.long, device=model.device)

    def turn(self, steps: int, compile: Any) -> tuple[float, float, Any, int]:
        """Median milliseconds, the longest of the first steps, in which a graph is made and which are not
        counted, why there was none, and bytes that a step reads."""
        with torch.no_grad(), attach(self.model, *self.parts, compile=compile) as session:
            warm = stepped(self.step, 6, self.model.device)
            found = stepped(self.step, steps, self.model.device)
            read = session.read_bytes
        return statistics.median(found), max(warm), session.why_not_captured, read

    def step(self) -> None:
        """A token."""
        out = self.model(self.ids, **with_cache(self.model, self.cache), use_cache=True)
        self.ids = out.logits[:, -1:].argmax(-1)


class Static:
    """Transformers' static cache, decoded by the model compiled as `generate` compiles it."""

    def __init__(self, model: Any, batch: int, tokens: int, room: int) -> None:
        self.model, self.ids = model, torch.ones(batch, 1, dtype=torch.long, device=model.device)
        self.at = torch.full((1,), tokens, device=model.device)
        self.cache = StaticCache(config=model.config, max_cache_len=tokens + room)
        config = model.config
        width = config.hidden_size // config.num_attention_heads
        shape = (batch, config.num_key_value_heads, 1, width)
        one = torch.zeros(shape, dtype=model.dtype, device=model.device)
        for number, layer in enumerate(self.cache.layers):
            self.cache.update(one, one, number, {"cache_position": self.at})
            layer.keys.normal_()
            layer.values.normal_()
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(tokens)
        self.call = model.get_compiled_call(None)

    def turn(self, steps: int, _: Any) -> tuple[float, float, Any, int]:
        """As `Decoding.turn`."""
        with torch.no_grad():
            warm = stepped(self.step, 6, self.model.device)
            return statistics.median(stepped(self.step, steps, self.model.device)), max(warm), None, 0

    def step(self) -> None:
        """A token."""
        out = self.call(
            input_ids=self.ids, position_ids=self.at[None], cache_position=self.at,
            **with_cache(self.model, self.cache), use_cache=True, return_dict=True,
        )  # fmt: skip
        self.ids = out.logits[:, -1:].argmax(-1)
        self.at = self.at + 1


def cell(model: Any, batch: int, tokens: int, methods: list[str], steps: int, rounds: int,
         static: bool, fused: list[str], rate: float) -> list[dict[str, Any]]:  # fmt: skip
    """All rows of a batch and a length."""
    cuda = model.device.type == "cuda"
    weights = sum(p.nbytes for p in model.parameters()) - model.model.embed_tokens.weight.nbytes
    made: dict[str, tuple[Any, Any]] = {}
    for method in methods:
        one = Decoding(model, method, batch, tokens)
        made[method] = one, "auto"
        if method in fused:
            made[f"{method}, fused"] = one, True
        if method == "full":
            made["full, eager"] = one, False
    if static:
        theirs = Static(model, batch, tokens, 2 * steps * rounds + 64)
        made["Transformers, static, compiled"] = theirs, None
    alone = linears(model, batch)
    found: dict[str, list[Any]] = {name: [] for name in ("linears", *made)}
    for _ in range(rounds):
        found["linears"].append((statistics.median(stepped(alone, steps, model.device)), 0, None, 0))
        for name, (one, compile) in list(made.items()):
            try:
                found[name].append(one.turn(steps, compile))
            except (RuntimeError, ValueError) as error:  # one method's failure is a row, not the end
                print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                del made[name]
    rows = []
    for name, turns in found.items():
        if not turns:
            continue
        row: dict[str, Any] = {"method": name, "batch": batch, "tokens": tokens}
        row["step_ms"] = round(statistics.median(turn[0] for turn in turns), 3)
        if name != "linears":
            row["longest_first_step_s"] = round(max(turn[1] for turn in turns) / 1e3, 2)
            row["why_not_captured"] = turns[-1][2]
        if read := turns[-1][3]:
            floor = 1e3 * (weights + read) / rate
            row |= {"floor_ms": round(floor, 3), "over_floor": round(row["step_ms"] / floor, 2)}
        rows.append(show(row))
    if cuda:
        rows.append(show({"peak_gib": torch.cuda.max_memory_allocated() / 2**30}))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cells", nargs="+", default=["1:8192", "1:131072", "8:32768"],
                        help="batch:tokens")  # fmt: skip
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--fused", nargs="*", default=list(METHODS[:4]))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-static", action="store_true")
    parser.add_argument("--name", default="captured-decode", help="of the file of results")
    parser.add_argument("--small", action="store_true", help="tiny widths, to try the script")
    given = parser.parse_args()
    model = shaped(given.layers, given.device, given.small)
    rate = measure_roof(torch.device(given.device), model.dtype).bytes_per_second
    rows = [show({"copy_gb_s": rate / 1e9})]
    for each in given.cells:
        batch, tokens = map(int, each.split(":"))
        rows += cell(model, batch, tokens, given.methods, given.steps, given.rounds,
                     not given.no_static, given.fused, rate)  # fmt: skip
        gc.collect()
        if given.device == "cuda":
            torch.cuda.empty_cache()
    save(given.name, given.device, rows)


if __name__ == "__main__":
    main()
