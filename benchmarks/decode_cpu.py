"""SmolLM2 decoding behind a long prompt on a CPU: Transformers' caches, growing and static, and ours."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import DynamicCache, StaticCache

import attlas
from attlas.compare.methods import parse_method
from attlas.hf.caches import with_cache
from common import interleaved, save, show

#: Steps that are timed together, and tokens that are read at once.
STEPS, READ = 8, 1024
METHODS = ("full", "snapkv(keep=0.25)", "quest(keep=0.125, page=32)")


def growing(model: Any, ids: torch.Tensor, method: str | None) -> Callable[[], None]:
    """Steps behind the prompt, by a method or without attlas; taken back where nothing was dropped."""

    def under() -> Any:
        return nullcontext() if method is None else attlas.attach(model, *parse_method(method).parts())

    cache = DynamicCache(config=model.config)
    with under():
        model(ids, **with_cache(model, cache), logits_to_keep=1)

    def run() -> None:
        with under():
            for _ in range(STEPS):
                model(ids[:, :1], **with_cache(model, cache))
        if method in (None, "full"):
            cache.crop(-STEPS)

    return run


def static(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    """Steps over a preallocated cache, the model compiled whole; they write over one another."""
    length = ids.shape[1]
    cache = StaticCache(config=model.config, max_cache_len=length + 64)
    for start in range(0, length, READ):
        positions = torch.arange(start, min(start + READ, length))[None]
        model(ids[:, start : start + READ], position_ids=positions, **with_cache(model, cache))
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False)

    def run() -> None:
        for step in range(STEPS):
            positions = torch.tensor([[length + step]])
            compiled(ids[:, :1], position_ids=positions, **with_cache(model, cache))
        for layer in cache.layers:
            layer.cumulative_length.fill_(length)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    model = attlas.load("smollm2").eval()
    ids = torch.randint(1000, 20000, (1, options.tokens))
    with torch.no_grad():
        runs = {"Transformers, growing cache": growing(model, ids, None)}
        runs |= {f"attlas, {method}": growing(model, ids, method) for method in METHODS}
        runs["Transformers, static cache, compiled"] = static(model, ids)
        taken = interleaved(runs, rounds=options.rounds, warm=1)
    rows = [
        show({"way": way, "tokens": options.tokens, "ms": ms / STEPS,
              "full_over_it": taken["attlas, full"] / ms})
        for way, ms in taken.items()
    ]  # fmt: skip
    save("smollm2-decode", "cpu", rows)


if __name__ == "__main__":
    main()
