"""SmolLM2 attached beside the bare model: without parts, and prefill under SnapKV."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers import DynamicCache

import attlas
from attlas.hf.caches import with_cache
from common import paired_ratio, save, show


def prefill(model: Any, ids: torch.Tensor, *parts: Any, attach: bool = True) -> Callable[[], None]:
    """One prompt on an empty cache; the block is entered anew each time, as a user would."""

    def run() -> None:
        with torch.no_grad(), attlas.attach(model, *parts) if attach else nullcontext():
            model(ids, **with_cache(model, DynamicCache(config=model.config)), logits_to_keep=1)

    return run


def decode(model: Any, ids: torch.Tensor, tokens: int, *, attach: bool) -> Callable[[], None]:
    """`tokens` steps behind a prompt whose cache is cropped back afterwards."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **with_cache(model, cache), logits_to_keep=1)
    step = ids[:, :1]

    def run() -> None:
        with torch.no_grad(), attlas.attach(model) if attach else nullcontext():
            for _ in range(tokens):
                model(step, **with_cache(model, cache))
        cache.crop(-tokens)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    options = parser.parse_args()
    model = attlas.load("smollm2").eval()
    rows = []
    for length in options.lengths:
        ids = torch.randint(1000, 20000, (1, length))
        snapkv = attlas.make("snapkv", keep=0.25)
        for what, ours, theirs in (
            ("prefill, no parts", prefill(model, ids), prefill(model, ids, attach=False)),
            ("prefill, snapkv", prefill(model, ids, snapkv), prefill(model, ids, attach=False)),
            ("decode 16, no parts", decode(model, ids, 16, attach=True),
             decode(model, ids, 16, attach=False)),
        ):  # fmt: skip
            timed = paired_ratio(ours, theirs, rounds=options.rounds)
            rows.append(show({"what": what, "length": length, **timed}))
    save("attached", "cpu", rows)


if __name__ == "__main__":
    main()
