"""What a decoding kernel computes, by plain operations in its arithmetic: how exact it can be."""

from __future__ import annotations

from collections.abc import Sequence
from math import e, log, log2
from typing import Any

import torch
from torch import Tensor

from attlas.ops.decode import _for_queries
from attlas.ops.reference import grouped_product
from attlas.ops.segments import Coded, Segment


def plain(
    q: Tensor, segments: Sequence[Segment], scale: float, units: int
) -> tuple[Tensor, Tensor]:
    """(outputs, sums) in float32 and to base 2: runs of blocks of slots, and the runs merged."""
    from attlas.kernels.decode import runs, tiles

    parts = []
    for segment in segments:
        coded = isinstance(segment, Coded)
        keys, many = (16, units) if coded else (tiles(q, segment).keys, runs(q, segment, units))
        blocks = [b for b in segment.blocks(q.shape[2], keys) if b[0].shape[2]]
        each = max(1, -(-len(blocks) // max(1, many)))
        parts += [_run(q, blocks[at : at + each], scale) for at in range(0, len(blocks), each)]
    means, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    base = _finite(lses.amax(0))
    shares = (lses - base).exp2()
    whole = shares.sum(0)
    out = (means * shares[..., None]).sum(0) / whole.masked_fill(whole == 0, 1.0)[..., None]
    return out.to(q.dtype), (base + whole.log2()) * log(2)


def _run(q: Tensor, blocks: Sequence[Any], scale: float) -> tuple[Tensor, Tensor]:
    """(means, sums to base 2) over blocks, one after the other."""
    top = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    total, summed = torch.zeros_like(top), torch.zeros(())
    for k, v, seen, bias in blocks:
        # Products of halves are exact in float32, in which they are summed.
        scores = grouped_product(q.float(), k.float().mT) * (scale * log2(e))
        if bias is not None:
            scores = scores + _for_queries(bias.float()[:, :, None], q.shape[1]) * log2(e)
        if seen is not None:
            scores = scores.masked_fill(~_for_queries(seen, q.shape[1]), -torch.inf)
        higher = torch.maximum(top, scores.amax(-1))
        base = _finite(higher)
        weights, shrink = (scores - base[..., None]).exp2(), (top - base).exp2()
        total = total * shrink + weights.sum(-1)
        found = grouped_product(weights.to(q.dtype).float(), v.to(q.dtype).float())
        summed = summed.to(q.device) * shrink[..., None] + found
        top = higher
    return summed / total.masked_fill(total == 0, 1.0)[..., None], top + total.log2()


def _finite(x: Tensor) -> Tensor:
    return x.masked_fill(x == -torch.inf, 0.0)
