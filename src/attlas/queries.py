"""Attention of some queries at a time, where the pairs of all of them would fill the memory.

    y[a:b] = aggregate(weigh(q[a:b], k[:e]), v[:e])      e: the keys that query b − 1 may see, if causal

A block is computed by the layer's own stages, on inputs cut to its queries: to a causal layer that is a
step of decoding, to any other a second sequence. So memory grows with the length, not with its square,
wherever a query's weights rest on that query alone. A backward pass computes each block again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from attlas import masks, ops
from attlas.inputs import Inputs
from attlas.masks import Mask
from attlas.supports import Supports
from attlas.tracing import stretches, traced

#: Pairs of a block, over all rows and heads: 64 MiB of scores in float32; on a CPU 16 MiB, which its
#: caches hold more of, take two thirds of the time.
BLOCK, CPU_BLOCK = 2**24, 2**22
#: Pairs up to which a pass that is differentiated holds all, rather than compute them twice: 512 MiB.
KEPT = 2**27


@runtime_checkable
class Weighing(Protocol):
    """A layer that makes weights of its own."""

    causal: bool
    supports: ClassVar[Supports]

    def weigh(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """Weights of all pairs of these queries and keys."""
        ...

    def aggregate(self, weights: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """What the queries get of the values."""
        ...


def in_blocks(layer: Weighing, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
    """weigh → aggregate of a layer, in as many blocks of queries as its pairs need."""
    size = _rows(layer, q, k, inputs)
    if size >= q.shape[2]:
        return layer.aggregate(layer.weigh(q, k, inputs), v, inputs)
    if inputs.told:
        told = inputs.positions_of(inputs.key_positions.shape[-1])
        inputs = replace(inputs, key_positions=told)
    return torch.cat([_block(layer, q, k, v, inputs, at) for at in stretches(q.shape[2], size)], dim=2)


def _rows(layer: Weighing, q: Tensor, k: Tensor, inputs: Inputs) -> int:
    """Queries of a block; all where that is no more than may be held, or where they hang together."""
    supports, queries, each = layer.supports, q.shape[2], q.shape[0] * q.shape[1] * k.shape[2]
    apart = supports.queries == "alone" and not supports.remembers
    if traced() or not apart or inputs.extras or inputs.notes:
        return queries
    if torch.is_grad_enabled() and queries * each <= KEPT:
        return queries
    most = CPU_BLOCK if q.device.type == "cpu" else BLOCK
    return max(1, most // max(1, each))


def _block(layer: Weighing, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, at: slice) -> Tensor:
    later = q.shape[2] - at.stop
    keys = k.shape[2] - (later if layer.causal else 0)
    some = _cut(inputs, at, later, keys, layer.causal)

    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return layer.aggregate(layer.weigh(q, k, some), v, some)

    return ops.recomputed(attended, q[:, :, at], k[:, :, :keys], v[:, :, :keys])


def _cut(inputs: Inputs, at: slice, later: int, keys: int, causal: bool) -> Inputs:
    """The inputs of the queries `at` and the first `keys` keys, `later` queries being left out; unless
    `causal` they are a sequence beside that of the keys."""
    pairs, mask, unseen = inputs.pairs, inputs.mask, later if causal else 0
    if isinstance(pairs, Tensor):
        pairs = pairs if pairs.shape[2] == 1 else pairs[:, :, at]
        pairs = pairs if pairs.shape[3] == 1 else pairs[..., :keys]
    elif isinstance(pairs, Mask) and not causal:
        pairs = masks.Shifted(pairs, -later)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        mask = mask[:, : mask.shape[1] - unseen]
    seen = inputs.key_positions.shape[-1] - unseen
    return replace(
        inputs, x=inputs.x[:, at], positions=inputs.positions[..., at], mask=mask, pairs=pairs,
        key_positions=inputs.key_positions[..., :seen], cache=None, notes={},
        context=inputs.context if causal else inputs.tokens, given=inputs.given or not causal,
        carried={name: x[:, :, :keys] for name, x in inputs.carried.items()},
    )  # fmt: skip
