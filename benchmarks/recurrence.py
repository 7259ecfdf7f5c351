"""`ops.recurrence` beside flash-linear-attention's op for the same recurrence, and softmax attention.

Every op once before anything is timed, with the seconds that takes; then forwards, and forwards with
backwards, alternately in pairs. Floors are what reading q, k, v and decays and writing outputs takes at
the device's bandwidth, and the multiply-adds of chunks of 64 at its bfloat16 peak. On a CPU, chunks in
float32 beside softmax attention.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attlas import ops
from attlas.bench import rivals
from attlas.bench.cells import KINDS, recurrent_call
from common import paired_ratio, save, show

HEADS, DIM = 16, 128
SHAPES = ((4, 8192), (1, 32768), (1, 131072))
#: Bytes and bfloat16 operations a second of the device, for floors; Hopper's data sheets.
BANDWIDTH = {"NVIDIA H100": 3.35e12, "NVIDIA H200": 4.8e12}
PEAK = 9.9e14
#: Tokens at which softmax attention is timed, for the crossover.
LENGTHS = (512, 1024, 2048, 4096, 8192)


def given(kind: str, batch: int, tokens: int) -> dict[str, Any]:
    """Arguments of `ops.recurrence`, as views [batch, heads, tokens, …] of token-first tensors."""
    random = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    return recurrent_call(kind, batch, HEADS, tokens, DIM, random)


def theirs(kind: str, call: dict[str, Any]) -> Callable[[], Tensor]:
    """flash-linear-attention's op for it."""
    run = rivals.linear_attention(kind, call)
    if run is None:
        raise SystemExit("flash-linear-attention is not installed; it is what this is held against")
    return run


def floors(kind: str, batch: int, tokens: int) -> dict[str, float]:
    """Milliseconds that a forward pass cannot go below."""
    rows = batch * HEADS * tokens
    name = torch.cuda.get_device_name()
    bandwidth = next((b for prefix, b in BANDWIDTH.items() if name.startswith(prefix)), 3.35e12)
    extra = {"token": 4, "gated delta": 6, "delta": 2, "channel": 4 * DIM, "low rank": 8 * DIM}
    moved = rows * (4 * 2 * DIM + extra.get(kind, 0))
    products = 2 * rows * DIM * (2 * 64 + 2 * DIM)
    return {"byte_floor_ms": moved / bandwidth * 1e3, "operation_floor_ms": products / PEAK * 1e3}


def tried(run: Callable[[], object]) -> float | str:
    """Seconds of a first run, or why there is none."""
    began = time.perf_counter()
    try:
        run()
        torch.cuda.synchronize()
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return time.perf_counter() - began


def compared(kind: str, shape: tuple[int, int], rounds: int, library: bool) -> list[dict[str, object]]:
    """Rows of forwards and of forwards with backwards."""
    batch, tokens = shape
    call = given(kind, batch, tokens)
    leaves = [x for n in ("q", "k", "v", "beta") if n in call for x in [call[n].requires_grad_()]]
    # Decays of heads are constants in the papers, so that neither side owes a gradient of them.
    if kind not in ("none", "head", "delta"):
        leaves.append(call["log_decay"].requires_grad_())
    up = torch.randn_like(call["v"])
    other = theirs(kind, call) if library else None
    rows = []
    for name in ("forward", "forward+backward"):
        wants = name != "forward"

        def run(op: Callable[[], Tensor], wants: bool = wants) -> None:
            with torch.set_grad_enabled(wants):
                out = op()
            if wants:
                torch.autograd.grad(out, leaves, up)

        def ours(run: Any = run) -> None:
            run(lambda: ops.recurrence(**call, scale=DIM**-0.5)[0])

        row: dict[str, object] = {"kind": kind, "batch": batch, "tokens": tokens, "pass": name}
        row["ours_first_s"] = tried(ours)
        row["theirs_first_s"] = None
        if other is not None:
            row["theirs_first_s"] = tried(lambda run=run: run(other))
        if isinstance(row["ours_first_s"], str):
            pass  # out of memory: the row says so
        elif isinstance(row["theirs_first_s"], float):
            row |= paired_ratio(ours, lambda run=run: run(other), rounds=rounds, device="cuda", queued=2)
        else:
            alone = paired_ratio(ours, ours, rounds=max(2, rounds // 4), device="cuda", queued=2)
            row["ours_ms"] = alone["ours_ms"]
        rows.append(show(row | (floors(kind, batch, tokens) if not wants else {})))
    return rows


def crossover(kind: str, rounds: int) -> list[dict[str, object]]:
    """Beside cuDNN's causal softmax attention, batch 4."""
    rows = []
    for tokens in LENGTHS:
        call = given(kind, 4, tokens)

        def softmax(call: dict[str, Any] = call) -> None:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                scaled_dot_product_attention(call["q"], call["k"], call["v"], is_causal=True)

        def ours(call: dict[str, Any] = call) -> None:
            ops.recurrence(**call)

        with torch.no_grad():
            timed = paired_ratio(ours, softmax, rounds=rounds, device="cuda")
        row = {"what": "beside softmax", "kind": kind, "tokens": tokens}
        rows.append(show(row | {n.replace("theirs", "softmax"): x for n, x in timed.items()}))
    return rows


def compilations(kind: str) -> dict[str, object]:
    """Programs compiled over 50 random lengths, after one."""
    from attlas.kernels.sweep import _sweep

    def compiled() -> int:
        return sum(len(cache[0]) for cache in _sweep.device_caches.values())

    lengths = torch.randint(64, 8192, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    ops.recurrence(**given(kind, 1, 4096))
    before = compiled()
    for tokens in lengths:
        ops.recurrence(**given(kind, 1, tokens))
    return show({"what": "programs over 50 lengths", "kind": kind, "compiled": compiled() - before})


def on_cpu(rounds: int) -> list[dict[str, object]]:
    """A decay a head, in chunks, beside softmax attention of the same width."""
    rows = []
    for tokens in (1024, 2048, 4096, 8192):
        q, k, v = (torch.randn(1, 8, tokens, 64) for _ in range(3))
        decay = -torch.rand(8) * 0.1
        timed = paired_ratio(
            lambda q=q, k=k, v=v, d=decay: ops.recurrence(q, k, v, log_decay=d),
            lambda q=q, k=k, v=v: scaled_dot_product_attention(q, k, v, is_causal=True),
            rounds=rounds,
        )
        named = {n.replace("theirs", "softmax"): x for n, x in timed.items()}
        rows.append(show({"kind": "head", "tokens": tokens, "heads": 8, "dim": 64, **named}))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--alone", action="store_true", help="without flash-linear-attention")
    parser.add_argument("--softmax", action="store_true", help="beside softmax attention instead")
    args = parser.parse_args()
    if args.device == "cpu":
        save("recurrence", "cpu", on_cpu(args.rounds))
        return
    rows: list[dict[str, object]] = []
    if args.softmax:
        for kind in args.kinds:
            rows += [*crossover(kind, args.rounds), compilations(kind)]
            save("recurrence-softmax", "cuda", rows)
        return
    for kind in args.kinds:
        for shape in SHAPES:
            rows += compared(kind, shape, args.rounds, not args.alone)
            save("recurrence", "cuda", rows)  # what is done stays, should the rest fail


if __name__ == "__main__":
    main()
