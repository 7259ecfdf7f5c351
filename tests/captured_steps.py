"""Decoding step by step under a session, for tests of captured steps on either device."""

from __future__ import annotations

from typing import Any

import torch

import attlas
import tiny_models
from attlas.attach import attach
from attlas.calibration import Calibrated, calibrate
from attlas.contract.families import find
from attlas.hf.caches import with_cache

PARTS: dict[str, list[Any]] = {
    "none": [],
    "snapkv": [("snapkv", {"tokens": 12, "window": 3})],
    "ada-kv": [("ada-kv", {"tokens": 12, "scorer_options": {"window": 3}})],
    "pyramid-kv": [("pyramid-kv", {"tokens": 12, "scorer_options": {"window": 3}, "beta": 2.0})],
    "streaming-llm": [("streaming-llm", {"tokens": 12, "sinks": 2})],
    "4 bits": [("quantized-cache", {"bits": 4, "key_group": 4, "recent": 4})],
    "2 bits": [("quantized-cache", {"bits": 2, "key_group": 8, "recent": 3})],
    "16 bits": [("quantized-cache", {"bits": 16, "key_group": 4, "recent": 4})],
    "quest": [("quest-page-selection", {"keep": 0.5, "page": 4, "dense_layers": (0,)})],
    "quest, number": [("quest-page-selection", {"pages": 3, "page": 2, "dense_layers": ()})],
    "loki": [("loki-low-rank-keys", {"keep": 0.5, "rank": 0.5, "block": 2})],
    "snapkv, 4 bits": [
        ("snapkv", {"tokens": 16, "window": 3}), ("quantized-cache", {"key_group": 4, "recent": 2}),
    ],
    "4 bits, quest": [
        ("quantized-cache", {"key_group": 4, "recent": 4}),
        ("quest-page-selection", {"keep": 0.5, "page": 4, "dense_layers": ()}),
    ],
}  # fmt: skip


#: Layers of ours, and why a step of a decoder made of them is not captured.
OURS = {
    "softmax": None, "grouped-query-attention": None, "selective-self-attention": None,
    "compressed-convolutional": None, "lightning-attention-2": None, "gated-linear-attention": None,
    "fast-weight-delta-rule": None, "arwkv-rwkv7": None, "retention": None, "transformer-vq": None,
    "qk-norm": None, "length-scaled-softplus-attention": None, "multi-head-latent-attention": None,
    "dual-attention": None, "differential-transformer": None, "alibi": None, "rope-nope-hybrid": None,
    "bayesian-attention-mechanism": None, "mfa-key-reuse": None,
    "titans-neural-memory": "a layer looks at where all keys stand",
    "castle-lookahead-keys": "the state 'lookahead' grows with every token",
    "titans-memory-as-gate": "MemoryAsGate in layer 0 does not say that it is roomy",
}  # fmt: skip


def parts(name: str, model: Any = None) -> list[Any]:
    made = [attlas.make(part, **options) for part, options in PARTS[name]]
    for part in made:
        if isinstance(part, Calibrated):
            part.calibration = calibrate(model, part, [tiny_models.prompt(1, 60, seed=3)])
    return made


def llama() -> Any:
    """In float64, where no code of a quantiser is decided by rounding."""
    return find("llama").model(num_hidden_layers=2).double()


def decoded(
    model: Any, name: str, steps: int, compile: Any, ids: Any, mask: Any = None, change: Any = None
) -> tuple[Any, list[Any]]:
    """(session, logits of every step), each greedy; `change` is called with step and cache."""
    found = []
    with torch.no_grad(), attach(model, *parts(name, model), compile=compile) as session:
        output = model(ids, attention_mask=mask, use_cache=True)
        for step in range(steps):
            found.append(output.logits[:, -1])
            token = output.logits[:, -1:].argmax(-1)
            positions = None
            if mask is not None:
                positions = mask.sum(1, keepdim=True)
                mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            cache = session.cache if change is None else change(step, session.cache)
            output = model(
                token, attention_mask=mask, position_ids=positions, use_cache=True,
                **with_cache(model, cache),
            )  # fmt: skip
    return session, found
