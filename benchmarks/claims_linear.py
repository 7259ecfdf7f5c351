"""Claims of cost and of error, measured: lightning attention, Linformer, agents, sampled softmax."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from claims_record import record
from common import paired_ratio

RESULTS = Path(__file__).resolve().parent / "results"


def lightning_speed() -> dict[str, Any]:
    """Nanoseconds a token of the recurrence, forwards, from the GPU's results."""
    found = json.loads((RESULTS / "recurrence-cuda.json").read_text())
    rows = [r for r in found["results"] if r["kind"] == "head" and r["pass"] == "forward"]
    each = {r["tokens"]: 1e6 * r["ours_ms"] / r["tokens"] for r in rows if r["batch"] == 1}
    short, long = each[32768], each[131072]
    made = record(
        "lightning-attention-2", "a token costs the same whatever the length",
        "forward, 16 heads of 128, bfloat16, a decay a head: nanoseconds a token", found["command"],
        {"32768 tokens": [short], "131072 tokens": [long]},
        "holds" if long <= 1.05 * short else "does not hold here", "lower", "ns",
    )  # fmt: skip
    return {**made, "machine": found["machine"], "versions": found["versions"]}


def _timed(name: str, tokens: int, **options: Any) -> tuple[list[float], list[float]]:
    """Milliseconds of a layer and of softmax attention of the same sizes, forwards, by seed."""
    import torch

    import attlas

    ours, theirs = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        layer = attlas.make(name, dim=256, heads=4, **options).eval()
        plain = attlas.make("softmax", dim=256, heads=4).eval()
        x = torch.randn(1, tokens, 256)
        with torch.no_grad():
            found = paired_ratio(lambda m=layer, x=x: m(x), lambda m=plain, x=x: m(x), rounds=3)
        ours.append(found["ours_ms"])
        theirs.append(found["theirs_ms"])
    return ours, theirs


def _cost(name: str, says: str, tokens: int, **options: Any) -> dict[str, Any]:
    (short, _), (ours, theirs) = _timed(name, tokens // 4, **options), _timed(name, tokens, **options)
    linear = min(ours) <= 5 * min(short)
    faster = max(ours) < min(theirs)
    judged = "does not hold here" if not linear else "holds" if faster else "partly"
    given = ", ".join(f"{option}={value}" for option, value in options.items())
    return record(
        name, says, f"forward, {tokens} tokens, 4 heads of 64, float32, two CPU cores; {given}",
        f"benchmarks/claims.py {name}",
        {"softmax": theirs, name: ours, f"{name} at {tokens // 4} tokens": short}, judged, "lower", "ms",
    )  # fmt: skip


def _sampled(name: str, says: str, tokens: int, **options: Any) -> dict[str, Any]:
    """Speed beside exact attention, and the error against it, of keys that lie in clusters."""
    import torch

    import attlas

    ours, theirs = _timed(name, tokens, **options)
    errors = []
    for seed in range(3):
        torch.manual_seed(seed)
        layer = attlas.make(name, dim=256, heads=4, **options).eval()
        centres = torch.randn(64, 256)
        x = centres[torch.randint(0, 64, (1, tokens))] + 0.3 * torch.randn(1, tokens, 256)
        errors.append(float(layer.error(x).mean()))
    judged = "holds" if max(ours) < min(theirs) and max(errors) < 0.1 else "partly"
    judged = judged if max(ours) < min(theirs) or max(errors) < 0.1 else "does not hold here"
    given = ", ".join(f"{option}={value}" for option, value in options.items())
    return record(
        name, says,
        f"forward, {tokens} tokens, 4 heads of 64, float32, two CPU cores (ms), and relative error of "
        f"untrained heads on tokens in 64 clusters; {given}", f"benchmarks/claims.py {name}",
        {"softmax, ms": theirs, f"{name}, ms": ours, f"{name}, error": errors}, judged, "lower",
    )  # fmt: skip


MEASURED: dict[str, Callable[[], dict[str, Any]]] = {
    "lightning-attention-2": lightning_speed,
    "linformer": lambda: _cost(
        "linformer", "its cost grows with the length, not with its square", 16384, rank=256,
        max_length=16384,
    ),
    "agent-attention": lambda: _cost(
        "agent-attention", "a few agents make many patches cheap", 16384, agents=49, place_bias=False
    ),
    "hyper-attention": lambda: _sampled(
        "hyper-attention", "blocks of alike keys and samples come near exact attention in less time",
        16384, block=256, samples=256,
    ),
    "kdeformer": lambda: _sampled(
        "kdeformer", "densities of kernels sample the keys that matter: near exact in less time", 16384,
        block=256, samples=256,
    ),
}  # fmt: skip
