"""Whole methods beside cuDNN's attention: what chooses or rounds is timed with what reads.

MoBA (blocks of 512, three a query; causal), SageAttention's 8 bits with values in FP8, and the latter's
integers alone; HiP by its own sizes and in blocks that a GPU likes, and its search alone, forward, since
nothing trains through it. bfloat16, interleaved in one run; `ratio` is how many times as fast as cuDNN.
Before anything is timed the first two are held against float64, the gradients of MoBA too: what is more
than twice as far off as the plain form stops the run. HiP's choice sees random keys: its time is that of
any, what it finds means nothing.

    python benchmarks/selected.py                            8k, 32k and 128k; 16 heads of 128
    python benchmarks/selected.py --methods hip --heads 32 --kv-heads 8 --name selected-hip
    python benchmarks/selected.py --heads 32 --kv-heads 8 --name selected-grouped
    python benchmarks/selected.py --tune --tokens 32768      tiles of SageAttention's kernel
    python benchmarks/selected.py --profile --tokens 131072  the kernels of each method
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from math import e, log2

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import attlas
from attlas import masks, ops
from attlas.attach.thinned import Text
from attlas.bases.blocks import Blocks
from attlas.ops.sage_attention import LARGEST, TINY, VALUES, sage_attention
from attlas.parts.select.hip import HiP
from common import interleaved, save, show

#: MoBA's own sizes.
BLOCK, TOPK = 512, 3
#: HiP: as published, and with blocks that fill a tile.
HIPS = {
    "hip": HiP(dense_layers=()),
    "hip, blocks of 128 and 32": HiP(q_block=128, k_block=32, stride=4, dense_layers=()),
}
#: Tiles that are tried: queries, keys, warps, stages.
TRIED = [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (64, 128, 4, 2),
         (64, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 4, 3)]  # fmt: skip


def blocks(q: Tensor, k: Tensor) -> Tensor:
    """MoBA's choice, by a layer whose weights play no part in it."""
    number = torch.arange(k.shape[2], device=k.device)[None] // BLOCK
    layer = attlas.make("moba", dim=q.shape[1], heads=q.shape[1], block=BLOCK, topk=TOPK)
    chosen: Tensor = layer.choose(q, k, Blocks(BLOCK, number, number, None))
    return chosen


def moba(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """MoBA's choice and its attention."""
    mask = masks.Pages(blocks(q, k), (1, BLOCK)) & masks.causal
    return ops.attend(q, k, v, mask=mask, route="lists")


def sage(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """8 bits."""
    mask = masks.causal if causal else None
    return sage_attention(q, k, v, mask=mask, bits=8, values="fp8", route="kernel")[0]


def rounded(q: Tensor, k: Tensor, v: Tensor) -> object:
    """What `sage` attends to."""
    from attlas.kernels.sage_codes import Bits, coded

    made = Bits(LARGEST[8], True, True, 32, 64, True, True, TINY)
    return coded(q, k, v, q.shape[-1] ** -0.5, log2(e), made)


def hip(part: HiP, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """HiP's search and its attention."""
    return part.attended(Text(0, q, k, v, q.shape[-1] ** -0.5))


def searched(part: HiP, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """HiP's search alone."""
    return part.lists(Text(0, q, k, v, q.shape[-1] ** -0.5))


def cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The fastest exact route."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def passed(method: Callable[..., object], given: list[Tensor], up: Tensor | None) -> None:
    """A forward pass, and the one back where there is a gradient to begin with."""
    with torch.set_grad_enabled(up is not None):
        out = method(*given)
    if up is not None:
        torch.autograd.grad(out, given, up)


def made(args: argparse.Namespace, tokens: int) -> tuple[list[Tensor], Tensor]:
    """(queries, keys and values; a gradient)."""
    torch.manual_seed(0)
    heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
    *given, up = (
        torch.randn(1, tokens, n, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for n in heads
    )
    return [x.requires_grad_() for x in given], up


def judged(where: str, ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Nothing, if ours is at most twice as far off as plain, and a rounding.

    Raises:
        SystemExit: it is further.
    """
    off, allowed = (float((x.double() - exact).abs().max()) for x in (ours, plain))
    unit = torch.finfo(ours.dtype).eps * float(exact.abs().max())
    print(f"{where}: {off:.3g} off, plain {allowed:.3g}", flush=True)
    if not off <= 2 * allowed + unit:
        raise SystemExit(f"{where}: more than twice as far off")


@torch.no_grad()
def check_sage(args: argparse.Namespace, tokens: int, causal: bool) -> None:
    """The last and some middle rows of two heads: the kernels, the plain form, float64."""
    (q, k, v), _ = made(args, tokens)
    k = k + 2 * torch.randn_like(k[:, :, :1])  # what smoothing is for
    out = sage(q, k, v, causal)
    group = args.heads // args.kv_heads
    for head, first in itertools.product((0, args.heads - 1), (0, tokens // 256 * 128, tokens - 128)):
        rows, up = slice(first, first + 128), slice(head // group, head // group + 1)
        parts = q[:, head : head + 1, rows], k[:, up], v[:, up]
        pattern: masks.Mask | None = masks.causal if causal else None
        options = {"mask": pattern, "q_offset": first, "route": "reference"}
        plain, _ = sage_attention(*parts, bits=8, k_block=128, **options)
        exact, _ = ops.attend(*(x.double() for x in parts), return_lse=True, **options)
        judged(f"sage, {tokens} tokens, causal {causal}, head {head}, from {first}",
               out[:, head : head + 1, rows], plain, exact)  # fmt: skip


def check_moba(args: argparse.Namespace, tokens: int) -> None:
    """Outputs and gradients over the chosen blocks: ours, plain bfloat16, float64."""
    given, up = made(args, tokens)
    mask = masks.Pages(blocks(*given[:2]), (1, BLOCK)) & masks.causal
    found = []
    for kind, route in ((up.dtype, "lists"), (up.dtype, "reference"), (torch.float64, "reference")):
        each = [x.detach().to(kind).requires_grad_() for x in given]
        out = ops.attend(*each, mask=mask, route=route)
        found.append([out.detach(), *torch.autograd.grad(out, each, up.to(kind))])
    for name, ours, plain, exact in zip(("out", "dq", "dk", "dv"), *found, strict=True):
        judged(f"moba, {tokens} tokens, {name}", ours, plain, exact)


def compared(args: argparse.Namespace) -> None:
    """Forward passes, and MoBA's with its gradients."""
    rows = []
    for tokens, causal in itertools.product(args.tokens, (True, False)):
        given, up = made(args, tokens)
        methods = {"cudnn": partial(cudnn, causal=causal)} | chosen_methods(args.methods, causal)
        for both in (False, True) if "moba" in methods else (False,):
            runs = {
                name: partial(passed, method, given, up if both else None)
                for name, method in methods.items() if not both or name in ("cudnn", "moba")
            }  # fmt: skip
            if len(runs) == 1:
                continue
            queued = 8 if tokens < 2**14 else 2
            times = interleaved(runs, rounds=args.rounds, device="cuda", queued=queued)
            for name in runs:
                if name != "cudnn":
                    row = {"tokens": tokens, "heads": args.heads, "kv_heads": args.kv_heads,
                           "causal": causal, "method": name, "passes": "both" if both else "forward",
                           "ms": times[name], "cudnn_ms": times["cudnn"],
                           "ratio": times["cudnn"] / times[name]}  # fmt: skip
                    if name in HIPS:
                        row["density"] = HIPS[name].density[0].mean().item()
                    rows.append(show(row))
        save(args.name, "cuda", rows)


def chosen_methods(names: list[str], causal: bool) -> dict[str, Callable[..., object]]:
    """Those of the methods that do causal attention, or that does not look at the order."""
    found: dict[str, Callable[..., object]] = {}
    if "sage" in names:
        found |= {"sage 8 bits": partial(sage, causal=causal), "sage's integers": rounded}
    if "moba" in names and causal:
        found["moba"] = moba
    if "hip" in names and causal:
        found |= {name: partial(hip, part) for name, part in HIPS.items()}
        found |= {f"{name}: search": partial(searched, part) for name, part in HIPS.items()}
    return found


@torch.no_grad()
def tune(args: argparse.Namespace) -> None:
    """Times of the tiles of SageAttention's kernel over integers, fastest first."""
    from attlas.kernels.sage import Tiles, sage_forward

    for tokens, causal in itertools.product(args.tokens, (True, False)):
        (q, k, v), _ = made(args, tokens)
        codes, times = rounded(q, k, v), {}
        for cut in TRIED:
            run = partial(sage_forward, codes, causal=causal, offset=0, lift=VALUES["fp8"][1],
                          out_dtype=q.dtype, cut=Tiles(*cut))  # fmt: skip
            try:
                times[cut] = interleaved({"it": run}, rounds=args.rounds, device="cuda", queued=2)["it"]
            except Exception as error:  # out of shared memory or registers, mostly
                print(f"{cut}: {type(error).__name__}: {str(error)[:120]}", flush=True)
        operations = 4 * args.heads * tokens**2 * 128 / (2 if causal else 1)
        for cut, time in sorted(times.items(), key=lambda pair: pair[1]):
            show({"tokens": tokens, "causal": causal, "tile": cut, "ms": time,
                  "tops": operations / time / 1e9})  # fmt: skip


@torch.no_grad()
def profiled(args: argparse.Namespace) -> None:
    """The kernels of each method."""
    for tokens, (name, method) in itertools.product(
        args.tokens, {"moba": moba, "sage": partial(sage, causal=True)}.items()
    ):
        given, _ = made(args, tokens)
        method(*given)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            method(*given)
            torch.cuda.synchronize()
        table = seen.key_averages().table(
            sort_by="cuda_time_total", row_limit=20, max_name_column_width=70
        )
        print(name, tokens, table, sep="\n")


def main() -> None:
    """Check, then what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, help="as many as heads unless given")
    parser.add_argument("--methods", nargs="+", default=["moba", "sage"], help="and hip")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tune", action="store_true", help="tiles instead")
    parser.add_argument("--profile", action="store_true", help="kernels instead")
    parser.add_argument("--name", default="selected", help="of the file of results")
    args = parser.parse_args()
    args.kv_heads = args.kv_heads or args.heads
    for tokens, causal in itertools.product((1024, *args.tokens), (True, False)):
        check_sage(args, tokens, causal)
    few = {"heads": 2, "kv_heads": 2 if args.kv_heads == args.heads else 1}
    check_moba(argparse.Namespace(**{**vars(args), **few}), 4096)
    (tune if args.tune else profiled if args.profile else compared)(args)


if __name__ == "__main__":
    main()
