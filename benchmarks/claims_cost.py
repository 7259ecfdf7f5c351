"""Claims of cost and of error, measured: claims/NAME.json of those that are named, or of all.

    python benchmarks/claims_cost.py [NAME ...]

Times do not repeat with a seed, so that these are no studies; `make docs` puts both into docs/claims.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attlas.study.record import packed, save
from common import paired_ratio

HERE = Path(__file__).resolve().parent
RESULTS, CLAIMS = HERE / "results", HERE / "claims"


def record(
    name: str, says: str, set_up: str, command: str, numbers: dict[str, list[float]], verdict: str,
    unit: str = "",
) -> dict[str, Any]:  # fmt: skip
    """The record of a claim whose numbers are the better the lower they are."""
    told = dict.fromkeys(numbers, (unit, "lower"))
    return packed(name, says, set_up, command, numbers, verdict, told)


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
        "holds" if long <= 1.05 * short else "does not hold here", "ns",
    )  # fmt: skip
    return {**made, "machine": found["machine"], "versions": found["versions"]}


def sparse_query_speed() -> dict[str, Any]:
    """A layer's forward pass beside the fastest SDPA layer's, from the GPU's results."""
    found = json.loads((RESULTS / "mechanisms-cuda.json").read_text())
    rows = {(r["name"], r["what"], r["length"]): r for r in found["results"]}
    row = rows["sparse-query-attention", "forward", 32768]
    share = row["ours_ms"] / row["theirs_ms"]
    made = record(
        "sparse-query-attention",
        "a quarter of the query heads makes long inputs up to three times as fast",
        "forward, 32768 tokens, 4 of 16 heads of 128, bfloat16, beside the fastest SDPA layer",
        found["command"], {"softmax": [row["theirs_ms"]], "sparse-query-attention": [row["ours_ms"]]},
        "holds" if share <= 1 / 3 else "partly" if share < 1 else "does not hold here", "ms",
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
        f"python benchmarks/claims_cost.py {name}",
        {"softmax": theirs, name: ours, f"{name} at {tokens // 4} tokens": short}, judged, "ms",
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
        f"untrained heads on tokens in 64 clusters; {given}", f"python benchmarks/claims_cost.py {name}",
        {"softmax, ms": theirs, f"{name}, ms": ours, f"{name}, error": errors}, judged,
    )  # fmt: skip


MEASURED: dict[str, Callable[[], dict[str, Any]]] = {
    "lightning-attention-2": lightning_speed,
    "sparse-query-attention": sparse_query_speed,
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


def main() -> None:
    for name in sys.argv[1:] or MEASURED:
        made = MEASURED[name]()
        save(made, CLAIMS / f"{name}.json")
        print(f"{name}: {made['verdict']}", flush=True)


if __name__ == "__main__":
    main()
