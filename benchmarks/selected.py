"""Whole methods beside cuDNN's causal attention: what chooses blocks is timed with what reads them.

MoBA (blocks of 512, three a query), SageAttention's 8 bits with values in FP8. bfloat16, heads of 128,
interleaved in one run; `ratio` is how many times as fast as cuDNN.

    python benchmarks/selected.py [--tokens 32768 131072]
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
from attlas.layers.sparse.moba import MoBA
from attlas.ops.sage_attention import sage_attention
from attlas.tracing import stretches
from common import interleaved, save, show

#: MoBA's own sizes.
BLOCK, TOPK = 512, 3


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


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The fastest exact route."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=True)


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
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows = []
    for tokens in args.tokens:
        torch.manual_seed(0)
        q, k, v, up = (
            torch.randn(1, tokens, args.heads, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
            for _ in range(4)
        )
        given = [x.requires_grad_() for x in (q, k, v)]
        methods = {"cudnn": cudnn, "moba": moba, "sage 8 bits": sage}
        for both in (False, True):
            runs = {
                name: partial(passed, method, given, up if both else None)
                for name, method in methods.items() if not (both and method is sage)
            }  # fmt: skip
            times = interleaved(runs, rounds=args.rounds, device="cuda", queued=2)
            for name in runs:
                if name != "cudnn":
                    row = {"tokens": tokens, "heads": args.heads, "method": name,
                           "passes": "both" if both else "forward", "ms": times[name],
                           "cudnn_ms": times["cudnn"], "ratio": times["cudnn"] / times[name]}  # fmt: skip
                    rows.append(show(row))
    save("selected", "cuda", rows)


if __name__ == "__main__":
    main()
