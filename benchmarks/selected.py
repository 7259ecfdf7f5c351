"""Whole methods beside cuDNN's causal attention: what chooses blocks is timed with what reads them.

MoBA (blocks of 512, three a query), SageAttention's 8 bits with values in FP8, HiP by its own sizes and
in blocks that a GPU likes, forward alone, since nothing trains through it. bfloat16, heads of 128,
interleaved in one run; `ratio` is how many times as fast as cuDNN. HiP's choice sees random keys: its
time is that of any, what it finds means nothing.

    python benchmarks/selected.py [--tokens 32768 131072] [--methods moba hip ...]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attlas import masks, ops
from attlas.attach.thinned import Text
from attlas.layers.sparse.moba import MoBA
from attlas.ops.sage_attention import sage_attention
from attlas.parts.select.hip import HiP
from attlas.tracing import stretches
from common import interleaved, save, show

#: MoBA's own sizes.
BLOCK, TOPK = 512, 3
#: HiP: as published, and with blocks that fill a tile.
HIPS = {
    "hip": HiP(dense_layers=()),
    "hip, blocks of 128 and 32": HiP(q_block=128, k_block=32, stride=4, dense_layers=()),
}


def moba(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """MoBA's choice and its attention."""
    own = torch.arange(q.shape[2], device=q.device)[None] // BLOCK
    with torch.no_grad():
        means = ops.page_means(k, BLOCK)
        chosen = torch.cat([
            ops.best_pages(MoBA.gate(q[:, :, rows], means, own[:, rows]).flatten(1, 2), TOPK)
            .unflatten(1, (q.shape[1], -1))
            for rows in stretches(q.shape[2], 4096)
        ], dim=2)  # fmt: skip
    mask = masks.Pages(chosen, (1, BLOCK)) & masks.causal
    return ops.attend(q, k, v, mask=mask, route="lists")


def sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """8 bits."""
    return sage_attention(q, k, v, mask=masks.causal, bits=8, values="fp8")[0]


def hip(part: HiP, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """HiP's search and its attention."""
    return part.attended(Text(0, q, k, v, q.shape[-1] ** -0.5))


def chosen(part: HiP, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """HiP's search alone."""
    return part.lists(Text(0, q, k, v, q.shape[-1] ** -0.5))


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The fastest exact route."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own choice, to try this file with."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def passed(method: Callable[..., Tensor], given: list[Tensor], up: Tensor | None) -> None:
    """A forward pass, and the one back where there is a gradient to begin with."""
    with torch.set_grad_enabled(up is not None):
        out = method(*given)
    if up is not None:
        torch.autograd.grad(out, given, up)


def main() -> None:
    """Forward passes, and MoBA's with its gradients."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--hip-heads", type=int, nargs=2, default=[32, 8], help="of queries and of keys")
    parser.add_argument("--methods", nargs="+", default=["moba", "sage", "hip"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--name", default="selected", help="of the file of results")
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    for tokens in args.tokens:
        own = {name: run for name, run in (("moba", moba), ("sage", sage)) if name in args.methods}
        if own:
            for both in (False, True):
                runs = {n: r for n, r in own.items() if not (both and n == "sage")}
                rows += compared(tokens, [args.heads] * 2, runs, both, args)
        if "hip" in args.methods:
            runs = {name: partial(hip, part) for name, part in HIPS.items()}
            runs |= {f"{name}: search": partial(chosen, part) for name, part in HIPS.items()}
            found = compared(tokens, args.hip_heads, runs, False, args)
            for row in found:
                part = HIPS[str(row["method"]).removesuffix(": search")]
                row["density"] = part.density[0].mean().item()
            rows += found
        save(args.name, args.device, rows)


def compared(
    tokens: int, heads: list[int], methods: dict[str, Callable[..., Tensor]], both: bool,
    args: argparse.Namespace,
) -> list[dict[str, object]]:  # fmt: skip
    """Rows of some methods, which take turns with cuDNN."""
    torch.manual_seed(0)
    numbers = heads[0], heads[1], heads[1], heads[0]
    *given, up = (
        torch.randn(1, tokens, h, 128, device=args.device, dtype=torch.bfloat16).transpose(1, 2)
        for h in numbers
    )
    given = [x.requires_grad_() for x in given]
    runs = {
        name: partial(passed, method, given, up if both else None)
        for name, method in {"cudnn": cudnn if args.device == "cuda" else plain, **methods}.items()
    }
    times = interleaved(runs, rounds=args.rounds, device=args.device, queued=2)
    return [
        show({"tokens": tokens, "heads": heads[0], "kv_heads": heads[1], "method": name,
              "passes": "both" if both else "forward", "ms": times[name], "cudnn_ms": times["cudnn"],
              "ratio": times["cudnn"] / times[name]})
        for name in methods
    ]  # fmt: skip


if __name__ == "__main__":
    main()
