"""Time to the first token of a model of Llama-8B's shape, for every part that thins out a prompt.

    python benchmarks/first_token.py [--tokens 8192 131072] [--layers 4] [--methods hip-attention ...]
    python benchmarks/first_token.py --device cpu --small --tokens 256 --rounds 1

Random weights, of which a few layers stand for all, since every layer costs the same: `layer_ms` is a
layer's share, and 32 of them are an 8B model's prompt but for the head. A whole prompt of random tokens
is read at once, the logits of its last token are asked for, and the cache is kept. Methods take turns;
medians. `none` is the model as Transformers runs it, `attlas` the same attached without a part, and `no
attention` leaves attention out: what a method that costs nothing would win.

What a method keeps by the content of a prompt means little here. Random weights give attention that is
spread wide: a choice by mass (sparge-prefill), by distance (vertical-slash) or by turns of the text
(dynamic-hierarchical-sparse-attention, whose predictor is random too) reads another share than a trained
model's would, so that times are to be read beside `density`. Flux attention's router is set aside:
`force="sparse"` is a layer that it decided to read sparsely. HiP leaves no layer dense, of which it has
three by default. Block attention reads its passages one by one, `known` puts them from memory.

A longer prompt is not tried with a method of which the shorter one says that it would take too long.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

import attlas
from attlas.attach import Call, attach
from attlas.attach.part import Selector
from attlas.cache.boundaries import Boundaries
from attlas.calibration import Calibration
from attlas.compare.methods import parse_method
from attlas.hf.caches import with_cache
from attlas.parts.select.dynamic_hierarchical import DynamicHierarchical
from attlas.storage.files import fingerprint
from attlas.tasks.roof import clock
from common import save, show
from model_decode import shaped

METHODS = (
    "none", "attlas", "no attention", "sparse-prefill", "star-prefill", "power-attention",
    "flux-attention(force='sparse')", "block-sparse", "hip-attention(dense_layers=())",
    "hip-attention(q_block=128, k_block=32, stride=4, dense_layers=())", "sparge-prefill",
    "sparge-prefill(mass=0.5, similar=-1.0)", "vertical-slash", "vertical-slash(slashes=200)",
    "dynamic-hierarchical-sparse-attention", "block-attention", "block-attention, known",
)  # fmt: skip
#: Passages of a prompt under block attention, and the tokens of its question.
PASSAGES, QUESTION = 15, 512


class Nothing(Selector):
    """Attention that costs nothing."""

    changes: ClassVar[tuple[str, ...]] = ("mask",)

    def attend(self, call: Call) -> Tensor:
        """Zeros."""
        return call.q.new_zeros(call.q.shape[0], call.q.shape[2], call.q.shape[1], call.v.shape[3])


def random_predictor(model: Any) -> Calibration:
    """Where chunks end, by weights that were never trained; all positions are above the threshold."""
    config = model.config
    width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    torch.manual_seed(0)
    weights = Boundaries(width).state_dict()
    return Calibration("dynamic-hierarchical-sparse-attention", fingerprint(model), weights)


class Prompt:
    """One method reading one prompt."""

    def __init__(self, model: Any, method: str, ids: Tensor) -> None:
        self.model, self.ids, self.parts = model, ids, ()
        self.adapter: Any = None
        if method.startswith("block-attention"):
            self.adapter = attlas.make("block-attention-rag")
            self.keep = method.endswith("known")
        elif method == "no attention":
            self.parts = (Nothing(),)
        elif method.startswith("dynamic-hierarchical"):
            self.parts = (
                DynamicHierarchical(calibration=random_predictor(model), threshold=-1e9),
            )
        elif method not in ("none", "attlas"):
            self.parts = parse_method(method).parts()
        self.attached: Callable[[], AbstractContextManager[Any]] = nullcontext
        if self.adapter is not None:
            self.attached = partial(self.adapter.inject, model)
        elif method != "none":
            self.attached = partial(attach, model, *self.parts, compile=False)

    @torch.no_grad()
    def seconds(self, times: int) -> list[float]:
        """Of the prompt, read so many times."""
        found, device = [], self.model.device
        with ExitStack() as stack:
            stack.enter_context(self.attached())
            for _ in range(times):
                if self.adapter is not None and not self.keep:
                    self.adapter._known.clear()
                began = clock(device)
                self.read()
                found.append(clock(device) - began)
        return found

    def read(self) -> None:
        """The prompt, up to the logits of its last token."""
        given: dict[str, Any] = {"use_cache": True, "logits_to_keep": 1}
        ids = self.ids
        if self.adapter is not None:
            context, ids = ids[0, :-QUESTION], ids[:, -QUESTION:]
            cache = self.adapter.context(context.split(-(-len(context) // PASSAGES)))
            given |= with_cache(self.model, cache)
        self.model(ids, **given).logits.argmax(-1)

    def density(self) -> list[float] | None:
        """Of the last prompt: the least, the mean and the greatest of all heads."""
        told = [d.float().cpu() for part in self.parts for d in getattr(part, "density", {}).values()]
        if not told:
            return None
        every = torch.stack(told)
        return [every.min().item(), every.mean().item(), every.max().item()]


def compared(model: Any, tokens: int, methods: list[str], args: argparse.Namespace,
             rows: list[dict[str, Any]]) -> dict[str, float]:  # fmt: skip
    """Rows of one length are added to `rows`; seconds by method."""
    torch.manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=model.device)
    made: dict[str, Prompt] = {}
    told: dict[str, dict[str, Any]] = {}
    for method in methods:
        told[method] = {"method": method, "tokens": tokens, "layers": args.layers}
        try:
            made[method] = Prompt(model, method, ids)
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            told[method]["first_s"] = made[method].seconds(1)[0]  # which compiles
            if model.device.type == "cuda":
                told[method]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        except Exception as error:  # one method's failure is a row, not the end
            told[method]["failed"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
            made.pop(method, None)
        release(model)
        print(told[method], flush=True)
    times: dict[str, list[float]] = {method: [] for method in made}
    for turn in range(args.rounds):
        names = list(made)
        for method in names[turn % len(names) :] + names[: turn % len(names)]:
            if not times[method] or times[method][0] < args.patience / args.rounds:
                times[method] += made[method].seconds(1)
            release(model)
    found = {method: statistics.median(each) for method, each in times.items()}
    for method, row in told.items():
        if method in found:
            row |= {"ms": 1e3 * found[method], "layer_ms": 1e3 * found[method] / args.layers,
                    "rounds": len(times[method]), "density": made[method].density()}  # fmt: skip
            if "none" in found:
                row["times_faster"] = found["none"] / found[method]
        rows.append(show(row))
    return found


def release(model: Any) -> None:
    """Give memory back between prompts."""
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 131072])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--patience", type=float, default=30.0, help="seconds that a method may take")
    parser.add_argument("--small", action="store_true", help="tiny widths, to try the script")
    args = parser.parse_args()
    model, rows = shaped(args.layers, args.device, args.small), []
    methods = list(args.methods)
    for tokens in args.tokens:
        found = compared(model, tokens, methods, args, rows)
        later = [n for n in args.tokens if n > tokens]
        if later:  # all pairs are looked at, at worst
            growth = (later[0] / tokens) ** 2
            for method in methods:
                if (needs := found.get(method, 0.0) * growth) > args.patience:
                    rows.append(show({"method": method, "tokens": later[0], "layers": args.layers,
                                      "failed": f"not tried: might take {needs:.0f} s"}))  # fmt: skip
            methods = [m for m in methods if m in found and found[m] * growth <= args.patience]
        save("first-token", args.device, rows)


if __name__ == "__main__":
    main()
