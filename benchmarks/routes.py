"""`ops.attend` beside every SDPA backend over a grid of shapes; windows and block masks."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attlas import masks, ops
from common import interleaved, paired_ratio, save, show, spent

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def block_masks(device: str) -> list[dict[str, object]]:
    """Seconds to build window BlockMasks, fresh each time."""
    rows = []
    for length in (4096, 16384, 65536):
        taken = []
        for turn in range(5):
            pattern = masks.causal & masks.window(1024 + turn)
            began = time.perf_counter()
            masks.block_mask(pattern, length, length, device=device)
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
        rows.append(show({"what": "block mask", "length": length, "seconds": sorted(taken)[2]}))
    return rows


def windows_on_cpu(rounds: int) -> list[dict[str, object]]:
    """Sliding windows: `attend` beside SDPA with the dense mask."""
    rows = []
    for length, size in ((4096, 256), (4096, 512), (8192, 512)):
        q, k, v = (torch.randn(1, 8, length, 64) for _ in range(3))
        pattern = masks.causal & masks.window(size)
        dense = masks.dense(pattern, length, length)
        timed = paired_ratio(
            lambda q=q, k=k, v=v, m=pattern: ops.attend(q, k, v, mask=m),
            lambda q=q, k=k, v=v, m=dense: scaled_dot_product_attention(q, k, v, attn_mask=m),
            rounds=rounds,
        )
        error = (
            ops.attend(q, k, v, mask=pattern) - scaled_dot_product_attention(q, k, v, attn_mask=dense)
        ).abs().max()  # fmt: skip
        row = {
            "what": "window",
            "length": length,
            "window": size,
            "largest difference": error.item(),
        }
        rows.append(show({**row, **timed, "times faster": 1 / timed["ratio"]}))
    return rows


def grid_on_gpu(rounds: int) -> list[dict[str, object]]:
    """`auto` beside SDPA's default and each backend: forward captured, forward with backward queued."""
    rows = []
    shapes = [(4, 16, 16, 512, 512, 64), (1, 16, 16, 1024, 1024, 128), (4, 16, 16, 2048, 2048, 128),
              (8, 32, 8, 2048, 2048, 128), (1, 16, 16, 8192, 8192, 128), (4, 12, 12, 4096, 4096, 64),
              (1, 16, 16, 32768, 32768, 128), (1, 32, 8, 1, 8192, 128), (8, 32, 8, 1, 8192, 128),
              (1, 32, 8, 1, 65536, 128), (8, 32, 8, 16, 8192, 128)]  # fmt: skip
    for batch, heads, kv_heads, queries, keys, dim in shapes:
        for trains in (False, True):
            if trains and queries != keys:
                continue
            make = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": trains}
            q = torch.randn(batch, heads, queries, dim, **make)
            k, v = (torch.randn(batch, kv_heads, keys, dim, **make) for _ in range(2))
            causal = queries == keys
            timed = _routes(q, k, v, causal, trains, rounds if keys < 16384 else rounds // 2)
            fastest = min(t for name, t in timed.items() if name != "auto")
            row = {"what": "forward+backward" if trains else "forward", "causal": causal,
                   "shape": [batch, heads, kv_heads, queries, keys, dim]}  # fmt: skip
            rows.append(show({**row, **timed, "ratio to fastest": timed["auto"] / fastest}))
    return rows


def _routes(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, trains: bool, rounds: int
) -> dict[str, float]:
    flags: dict[str, Any] = {"is_causal": causal, "enable_gqa": q.shape[1] != k.shape[1]}
    grad = torch.randn_like(q)

    def timed(call: Callable[[], Tensor]) -> Callable[[], object]:
        if not trains:
            return call
        return lambda: torch.autograd.grad(call(), (q, k, v), grad)

    def through(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, **flags)

        return call

    pattern = masks.causal if causal else None
    candidates = {
        "auto": timed(lambda: ops.attend(q, k, v, mask=pattern)),
        "default": timed(lambda: scaled_dot_product_attention(q, k, v, **flags)),
    }
    for name, backend in BACKENDS.items():
        run = timed(through(backend))
        try:
            run()
        except RuntimeError:  # this backend does not take this call
            continue
        candidates[name] = run
    if not trains:  # captured: what the device does, without the time to launch it
        candidates = {name: captured(run) for name, run in candidates.items()}
    return interleaved(candidates, rounds=rounds, device="cuda", warm=3)


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph; it is run first, so that its choices are made."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def launches() -> list[dict[str, object]]:
    """Microseconds of Python and launching for a call too small to fill the device."""
    q, k, v = (torch.randn(1, 4, 64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    timed = interleaved(
        {
            "auto": lambda: ops.attend(q, k, v, mask=masks.causal),
            "default": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
        },
        rounds=101, device="cuda",
    )  # fmt: skip
    return [show({"what": "launch, microseconds", **{n: t * 1e3 for n, t in timed.items()}})]


def python_on_cpu(rounds: int) -> list[dict[str, object]]:
    """What `attend` asks of Python besides the same call of SDPA, on tensors that hold nothing."""
    rows = []
    for what, queries, kv_heads in (("all", 4, 2), ("causal", 4, 2), ("causal, grouped", 4, 1),
                                    ("causal, last query", 1, 2)):  # fmt: skip
        for trains in (False, True):
            q = torch.randn(1, 2, queries, 16, requires_grad=trains)
            k, v = (torch.randn(1, kv_heads, 4, 16, requires_grad=trains) for _ in range(2))
            flags: dict[str, Any] = {"is_causal": what != "all" and queries == 4}
            flags |= {"enable_gqa": True} if kv_heads == 1 else {}
            pattern = None if what == "all" else masks.causal
            taken = spent(
                lambda q=q, k=k, v=v, m=pattern: ops.attend(q, k, v, mask=m),
                lambda q=q, k=k, v=v, f=flags: scaled_dot_product_attention(q, k, v, **f),
                rounds=rounds,
            )
            rows.append(show({"what": "python", "call": what, "trains": trains, **taken}))
    return rows


def windows_on_gpu(rounds: int) -> list[dict[str, object]]:
    """Sliding windows through FlexAttention beside causal SDPA on its fastest backend."""
    rows = []
    for length in (8192, 32768):
        q, k, v = (
            torch.randn(1, 16, length, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)
        )
        pattern = masks.causal & masks.window(1024)
        timed = interleaved(
            {
                "window": lambda q=q, k=k, v=v, m=pattern: ops.attend(q, k, v, mask=m),
                "causal": lambda q=q, k=k, v=v: ops.attend(q, k, v, mask=masks.causal),
            },
            rounds=rounds, device="cuda",
        )  # fmt: skip
        exact, _ = ops.reference(
            *(t[:, :1].double() for t in (q[:, :, -64:], k, v)), scale=128**-0.5, mask=pattern,
            q_offset=length - 64,
        )  # fmt: skip
        error = (ops.attend(q, k, v, mask=pattern)[:, :1, -64:] - exact).abs().max().item()
        rows.append(show({"what": "window 1024", "length": length, **timed, "error": error}))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    rows = block_masks(options.device)
    if options.device == "cuda":
        rows += launches() + grid_on_gpu(options.rounds) + windows_on_gpu(options.rounds)
    else:
        save("routes-python", "cpu", python_on_cpu(rounds=201))
        rows += windows_on_cpu(options.rounds)
    save("routes", options.device, rows)


if __name__ == "__main__":
    main()
