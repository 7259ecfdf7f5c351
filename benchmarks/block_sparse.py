"""`ops.block_sparse` beside cuDNN's full attention and FlexAttention with the same lists.

Random lists of every head in bfloat16, with and without causal, forwards and forwards with backwards.
Before a cell is timed, some blocks of its queries, and at the least density one of its keys, are held
against float64: what is more than twice as far off as plain bfloat16 stops the run. `reached` is the
speed of a listed pair beside that of a pair of cuDNN's: 0.74 means 0.74 / density times as fast.

    python benchmarks/block_sparse.py                        32k and 128k, densities 1/2 to 1/16
    python benchmarks/block_sparse.py --tokens 32768 --size 64 64 --no-flex
    python benchmarks/block_sparse.py --million              1M tokens, causal, 1/32, ours alone
    python benchmarks/block_sparse.py --tune                 tiles of the kernels, fastest first
    TRITON_INTERPRET=1 python benchmarks/block_sparse.py --dry
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention, noop_mask
from torch.nn.functional import pad, scaled_dot_product_attention

from attlas import masks, ops
from attlas.ops import block_kernels
from common import interleaved, save, show

DENSITIES = (2, 4, 8, 16)
#: Tiles that are tried: rows of queries, keys, warps, stages, TMA.
TRIED = {
    "forward": [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4),
                (128, 64, 4, 2), (128, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2)],
    "queries": [(128, 64, 8, 1), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 1), (64, 64, 4, 1),
                (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 3)],
    "keys": [(64, 128, 8, 1), (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3),
             (128, 64, 8, 2), (64, 64, 4, 1), (64, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 3)],
}  # fmt: skip


class Cell:
    """Tensors of one length, and lists of one density after the other."""

    def __init__(self, args: argparse.Namespace, tokens: int, causal: bool) -> None:
        torch.manual_seed(0)
        self.tokens, self.causal, self.size, self.device = tokens, causal, args.size, args.device
        make = {"device": args.device, "dtype": torch.float16 if args.dry else torch.bfloat16}
        heads = (args.heads, args.kv_heads, args.kv_heads, args.heads)
        *given, self.d_out = (
            torch.randn(1, tokens, h, args.width, **make).transpose(1, 2) for h in heads
        )
        self.q, self.k, self.v = (x.requires_grad_() for x in given)
        self.lists, self.mask = args.lists, masks.causal if causal else None

    def blocks(self, density: int) -> tuple[Tensor, float]:
        """(Random lists, their own block in each under causal; the share of pairs that is listed)."""
        rows, columns = (-(-self.tokens // n) for n in self.size)
        chosen, seen = [], torch.ones(rows, columns, dtype=torch.bool, device=self.device)
        if self.causal:
            last = (torch.arange(rows, device=self.device)[:, None] + 1) * self.size[0] - 1
            seen = torch.arange(columns, device=self.device) * self.size[1] <= last
        many = (seen.sum(-1, keepdim=True) / density).ceil()
        for _ in range(self.lists):
            luck = torch.rand(rows, columns, device=self.device).masked_fill(~seen, -1.0)
            if self.causal:
                luck.scatter_(1, seen.sum(-1, keepdim=True) - 1, 2.0)
            chosen.append(luck.argsort(-1, descending=True).argsort(-1) < many)
        table = torch.stack(chosen)[None]
        longest = int(table.sum(-1).max())
        share = float(table.sum() / (seen.sum() * self.lists))
        return ops.as_lists(table)[..., :longest].contiguous(), share

    def ours(self, blocks: Tensor) -> Tensor:
        """Kernels over the lists, which are well formed."""
        given = self.q, self.k, self.v, blocks, self.size, self.mask
        return block_kernels.attended(*given, None, self.q.shape[-1] ** -0.5, 0)[0]

    def full(self) -> Tensor:
        """cuDNN over all pairs."""
        backend = SDPBackend.CUDNN_ATTENTION if self.q.is_cuda else SDPBackend.MATH
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(
                self.q, self.k, self.v, is_causal=self.causal, enable_gqa=True
            )

    def flex(self, blocks: Tensor, both: bool) -> Callable[[], Tensor]:
        """FlexAttention over the lists, whose tensors the compiled program is given."""
        columns = -(-self.tokens // self.size[1])
        blocks = pad(blocks, (0, columns - blocks.shape[3]), value=-1)
        first = torch.arange(blocks.shape[2], device=self.device)[:, None] * self.size[0]
        whole = (blocks >= 0) & (((blocks + 1) * self.size[1] - 1 <= first) | (not self.causal))
        parts = []
        for chosen in ((blocks >= 0) & ~whole, whole):
            order = (~chosen).byte().argsort(dim=-1, stable=True)
            parts += [chosen.sum(-1, dtype=torch.int32), blocks.clamp(min=0).gather(-1, order).int()]
        heads = [x.repeat_interleave(self.q.shape[1] // self.lists, 1) for x in parts]
        made = BlockMask.from_kv_blocks(
            *heads, BLOCK_SIZE=self.size, mask_mod=_causal if self.causal else noop_mask,
            seq_lengths=(self.tokens, self.tokens), compute_q_blocks=both,
        )  # fmt: skip
        return lambda: _compiled()(self.q, self.k, self.v, block_mask=made, enable_gqa=True)

    def checked(self, blocks: Tensor, both: bool, keys: bool) -> None:
        """Some rows, and a block of keys where that is asked for, against float64.

        Raises:
            SystemExit: one is further off than twice what plain arithmetic of the type is.
        """
        out = self.ours(blocks)
        grads = torch.autograd.grad(out, (self.q, self.k, self.v), self.d_out) if both else None
        heads, group = self.q.shape[1], self.q.shape[1] // self.k.shape[1]
        last = blocks.shape[2] - 1
        for head, row in itertools.product((0, heads - 1), (0, last // 2, last)):
            at = slice(row * self.size[0], min((row + 1) * self.size[0], self.tokens))
            of, up = self.keys_of(blocks, head, row), head // group
            parts = self.q[0, head, at], self.k[0, up, of], self.v[0, up, of]
            place = torch.arange(at.start, at.stop, device=self.device), of
            found = [out[0, head, at]] + ([grads[0][0, head, at]] if grads else [])
            exact, plain = (self.small(parts, place, self.d_out[0, head, at], kind)[: len(found)]
                            for kind in (torch.float64, self.q.dtype))  # fmt: skip
            _judge(f"head {head}, queries from {at.start}", found, exact, plain)
        if grads and keys:
            self.check_keys(blocks, grads)

    def keys_of(self, blocks: Tensor, head: int, row: int) -> Tensor:
        """Numbers of the keys that are listed for a block of queries."""
        own = blocks[0, head * blocks.shape[1] // self.q.shape[1], row]
        own = own[own >= 0].long()
        keys = own[:, None] * self.size[1] + torch.arange(self.size[1], device=self.device)
        return keys.flatten()[keys.flatten() < self.tokens]

    def small(
        self, parts: tuple[Tensor, ...], place: tuple[Tensor, Tensor], d_out: Tensor, kind: torch.dtype
    ) -> list[Tensor]:
        """(out, dq, dk, dv) of some queries and their keys, in arithmetic of a type."""
        q, k, v = (x.detach().to(kind).requires_grad_() for x in parts)
        scores = ((q @ k.T) * q.shape[-1] ** -0.5).to(torch.promote_types(kind, torch.float32))
        if self.causal:
            scores = scores.masked_fill(place[1] > place[0][:, None], -torch.inf)
        out = scores.softmax(-1).to(kind) @ v
        return [out, *torch.autograd.grad(out, (q, k, v), d_out.to(kind))]

    def check_keys(self, blocks: Tensor, grads: tuple[Tensor, ...]) -> None:
        """dk and dv of the middle block of keys of the first head, over all blocks of queries."""
        number = -(-self.tokens // self.size[1]) // 2
        sums: dict[torch.dtype, list[Any]] = {torch.float64: [0, 0], self.q.dtype: [0, 0]}
        for head in range(self.q.shape[1] // self.k.shape[1]):
            own = blocks[0, head * blocks.shape[1] // self.q.shape[1]]
            for row in (own == number).any(-1).nonzero()[:, 0].tolist():
                at = slice(row * self.size[0], min((row + 1) * self.size[0], self.tokens))
                keys = self.keys_of(blocks, head, row)
                here = keys // self.size[1] == number
                parts = (self.q[0, head, at], self.k[0, 0, keys], self.v[0, 0, keys])
                place = torch.arange(at.start, at.stop, device=self.device), keys
                for kind, total in sums.items():
                    each = self.small(parts, place, self.d_out[0, head, at], kind)[2:]
                    total[:] = [a + b[here].double() for a, b in zip(total, each, strict=True)]
        at = slice(number * self.size[1], min((number + 1) * self.size[1], self.tokens))
        _judge(f"keys from {at.start}", [g[0, 0, at] for g in grads[1:]], *sums.values())


def _judge(where: str, found: list[Tensor], exact: list[Tensor], plain: list[Tensor]) -> None:
    for name, (ours, true, theirs) in enumerate(zip(found, exact, plain, strict=True)):
        off, allowed = ((x.double() - true).abs().max().item() for x in (ours, theirs))
        unit = torch.finfo(ours.dtype).eps * true.abs().max().item()
        if not off <= 2 * allowed + unit:
            raise SystemExit(f"{where}, number {name}: {off:.3g} off, {allowed:.3g} by plain arithmetic")


def _causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return kv_idx <= q_idx


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def compared(args: argparse.Namespace) -> list[dict[str, object]]:
    """Rows of every length, mask and pass."""
    rows: list[dict[str, object]] = []
    for tokens, causal in itertools.product(args.tokens, args.causal):
        cell = Cell(args, tokens, causal)
        lists = {n: cell.blocks(n) for n in args.densities}
        for both in args.backward:
            calls: dict[str, Callable[[], Tensor]] = {} if args.million else {"full": cell.full}
            for n, (blocks, _) in lists.items():
                cell.checked(blocks, both, n == max(args.densities))
                calls[f"ours 1/{n}"] = partial(cell.ours, blocks)
                if args.flex:
                    calls[f"flex 1/{n}"] = cell.flex(blocks, both)
            timed = {name: _passes(cell, run, both) for name, run in calls.items()}
            timed = {name: run for name, run in timed.items() if _runs(name, run)}
            queued = 4 if args.device == "cuda" and tokens < 2**16 else 1
            times = interleaved(timed, rounds=args.rounds, device=args.device, warm=1, queued=queued)
            for n, (_, share) in lists.items():
                row: dict[str, object] = {
                    "tokens": tokens, "size": list(args.size), "lists": args.lists, "causal": causal,
                    "pass": "forward+backward" if both else "forward", "listed": share,
                    "ours_ms": times[f"ours 1/{n}"], "flex_ms": times.get(f"flex 1/{n}"),
                }  # fmt: skip
                if "full" in times:
                    faster = times["full"] / times[f"ours 1/{n}"]
                    row |= {"full_ms": times["full"], "times_faster": faster, "reached": faster * share}
                rows.append(show(row))
            if not args.dry:
                save(args.name, args.device, rows)  # what is done stays, should the rest fail
    return rows


def _passes(cell: Cell, run: Callable[[], Tensor], both: bool) -> Callable[[], object]:
    def once() -> object:
        with torch.set_grad_enabled(both):
            out = run()
        return torch.autograd.grad(out, (cell.q, cell.k, cell.v), cell.d_out) if both else out

    return once


def _runs(name: str, run: Callable[[], object]) -> bool:
    """Whether a rival takes the call; what is ours must."""
    try:
        run()
    except Exception as error:  # a compiler's, of any kind
        if name.startswith("ours"):
            raise
        print(f"{name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return False
    return True


def tune(args: argparse.Namespace) -> None:
    """Times of the kernels' tiles, each kernel alone, fastest first."""
    from attlas.kernels import block_sparse_run as run

    for kernel, causal in itertools.product(args.only, args.causal):
        cell = Cell(args, args.tokens[0], causal)
        blocks, share = cell.blocks(args.densities[0])
        listed = run.Listed(blocks, args.size, causal, None, args.width**-0.5, 0)
        call = run.Call(cell.q.detach(), cell.k.detach(), cell.v.detach(), None, listed)
        sums = call.rows(*call.forward(), cell.d_out, None)
        above = cell.d_out, *sums
        steps = {"forward": call.forward, "queries": partial(call.to_queries, *above),
                 "keys": partial(call.to_keys, *above)}  # fmt: skip
        key = kernel, 2, max(64, args.width)
        usual, times = run.TILES[key], {}
        products = {"forward": 2, "queries": 3, "keys": 4}[kernel]
        pairs = args.heads * args.tokens[0] ** 2 * share / (2 if causal else 1)
        for cut, tma in itertools.product(TRIED[kernel], args.tma):
            run.TILES[key] = run.Tile(*cut, bool(tma))
            try:
                it = {"it": steps[kernel]}
                found = interleaved(it, rounds=args.rounds, device=args.device, queued=2)
                times[(*cut, tma)] = found["it"]
            except Exception as error:  # out of shared memory, mostly
                print(f"{kernel} {cut} {tma}: {type(error).__name__}: {str(error)[:120]}", flush=True)
        run.TILES[key] = usual
        for cut, time in sorted(times.items(), key=lambda pair: pair[1]):
            rate = 2 * products * pairs * args.width / time / 1e9
            show({"kernel": kernel, "causal": causal, "tile": cut, "ms": time, "tflops": rate})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--densities", type=int, nargs="+", default=list(DENSITIES), help="1 / these")
    parser.add_argument("--size", type=int, nargs=2, default=[128, 128], help="of blocks")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--lists", type=int, help="heads with lists of their own; all")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--causal", type=int, nargs="+", default=[0, 1], choices=[0, 1])
    parser.add_argument("--backward", type=int, nargs="+", default=[0, 1], choices=[0, 1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--flex", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--million", action="store_true", help="1M tokens, one list, 1/32, causal")
    parser.add_argument("--tune", action="store_true", help="tiles instead")
    parser.add_argument("--only", nargs="+", default=list(TRIED), choices=list(TRIED))
    parser.add_argument("--tma", type=int, nargs="+", default=[1, 0], choices=[0, 1])
    parser.add_argument("--dry", action="store_true", help="toys on a CPU, by Triton's interpreter")
    parser.add_argument("--name", default="block-sparse", help="of the file of results")
    args = parser.parse_args()
    args.size, args.lists = tuple(args.size), args.lists or args.heads
    args.causal, args.backward = [bool(n) for n in args.causal], [bool(n) for n in args.backward]
    args.device = "cpu" if args.dry else "cuda"
    if args.million:
        args.tokens, args.densities, args.lists, args.causal = [2**20], [32], 1, [True]
        args.flex, args.name = False, f"{args.name}-million"
    if args.dry:
        args.tokens, args.densities, args.size, args.rounds, args.flex = [100], [2], (16, 16), 1, False
        args.heads, args.kv_heads, args.lists, args.width = 2, 1, 2, 16
    with patch("torch.cuda.device_of", lambda x: nullcontext()) if args.dry else nullcontext():
        (tune if args.tune else compared)(args)


if __name__ == "__main__":
    main()
