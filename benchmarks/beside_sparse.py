"""Windows with sinks and 8-bit attention beside what the package index offers for them.

    pip install flash-sparse-attn==2.0.6 sageattention==1.0.6     the first wants triton_kernels too,
                                                                 which is in Triton's repository alone
    python benchmarks/beside_sparse.py [--tokens 32768 131072]

`flash-sparse-attn` takes no lists of blocks any more: its windows with sinks, by its exact kernel, are
what both do. `sageattention` from the index multiplies queries and keys in 8 bits and keeps values in
16. bfloat16, heads of 128, causal, forward, interleaved in one run; `ratio` is the other's time over
ours, and `difference` how far its numbers are from ours, over our largest.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attlas import masks, ops
from attlas.ops.sage_attention import sage_attention
from common import interleaved, save, show
from selected import cudnn

#: Newest tokens that are seen, and first ones.
WINDOW, SINKS = 2048, 128

#: (What both do, ours, the other's name, the other).
Pair = tuple[str, Callable[[], Tensor], str, Callable[[], Tensor]]


def pairs(q: Tensor, k: Tensor, v: Tensor) -> Iterator[Callable[[], Pair]]:
    """What is compared, each made when it is its turn, since a package may be missing."""

    def window() -> Pair:
        from flash_sparse_attn import flash_dense_attn_func

        first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        sizes = torch.tensor([[SINKS, 0, 0, WINDOW]] * k.shape[1], dtype=torch.int32, device=q.device)
        seen = masks.causal & (masks.window(WINDOW) | masks.sinks(SINKS))
        return (
            f"window {WINDOW}, sinks {SINKS}", lambda: ops.attend(q, k, v, mask=seen),
            "flash-sparse-attn",
            lambda: flash_dense_attn_func(*first, is_causal=True, window_sizes=sizes).transpose(1, 2),
        )  # fmt: skip

    def eight() -> Pair:
        from sageattention import sageattn

        # It takes the mean from the keys it is given, in place.
        own: list[Any] = [x.clone() for x in (q, k, v)]
        return (
            "8 bits", lambda: sage_attention(q, k, v, mask=masks.causal, bits=8, values="fp8")[0],
            "sageattention", lambda: sageattn(*own, is_causal=True),
        )  # fmt: skip

    yield from (window, eight)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8], help="of queries and of keys")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows: list[dict[str, object]] = []
    for tokens in args.tokens:
        torch.manual_seed(0)
        q, k, v = (
            torch.randn(1, h, tokens, 128, device="cuda", dtype=torch.bfloat16)
            for h in (args.heads[0], args.heads[1], args.heads[1])
        )
        for make in pairs(q, k, v):
            row: dict[str, object] = {
                "tokens": tokens, "heads": args.heads, "what": make.__name__
            }  # fmt: skip
            try:
                what, ours, other, theirs = make()
                row |= {"what": what, "beside": other}
                found, expected = theirs(), ours()
                off = (found.float() - expected.float()).abs().max() / expected.float().abs().max()
                runs = {"ours": ours, other: theirs, "cudnn": partial(cudnn, q, k, v)}
                times = interleaved(runs, rounds=args.rounds, device="cuda", queued=2)
                row |= {"ours_ms": times["ours"], "theirs_ms": times[other],
                        "cudnn_ms": times["cudnn"], "ratio": times[other] / times["ours"],
                        "difference": off.item()}  # fmt: skip
            except Exception as error:  # another package's is a row, not the end
                row["failed"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
            rows.append(show(row))
            save("beside-sparse", "cuda", rows)


if __name__ == "__main__":
    main()
