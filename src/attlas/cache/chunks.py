"""Chunks of a text, counted by each row's own tokens: their keys, and keys and values by chunk."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas import ops
from attlas.attach.call import Call
from attlas.storage.layer import LayerState, StoredLayer
from attlas.storage.rotary import Rotary
from attlas.storage.rows import left_aligned


class ChunkKeys:
    """The keys of the complete chunks of one layer, for each query head, and what is needed for the next.

    Args:
        size: tokens of a chunk.
        state: holds "chunks", the keys [batch, heads, chunks, dim], and "pending", the queries of the
            chunk that is not complete, each row's first ones.
    """

    def __init__(self, size: int, state: LayerState) -> None:
        self.size, self.state = size, state

    def grow(self, call: Call) -> None:
        """Take in the tokens of a call."""
        size, tensors = self.size, self.state.tensors
        before, after = call.counts
        done, full = ([count // size for count in counts] for counts in (before, after))
        queries = self._queries(call, before)
        if done == full:
            tensors["pending"] = queries[:, :, : max(n % size for n in after)].clone()
            tensors.setdefault("chunks", queries[:, :, :0])
            return
        k, v, starts = self._tail(call, done)
        first = call.row_starts
        spans = list(zip(done, full, starts, strict=True))
        rows = (
            [slice(None)] if len(set(spans)) == 1 else [slice(r, r + 1) for r in range(len(spans))]
        )
        chunks = queries.new_zeros(*queries.shape[:2], max(full), queries.shape[-1])
        pending = queries.new_zeros(
            *queries.shape[:2], max(n % size for n in after), chunks.shape[-1]
        )
        if "chunks" in tensors:
            chunks[:, :, : tensors["chunks"].shape[2]] = tensors["chunks"]
        for row, (old, new, start) in zip(rows, spans, strict=False):
            count = (new - old) * size
            if count:
                at = slice(start, start + count)
                position = first[row, None] + old * size + torch.arange(count, device=first.device)
                chunks[row, :, old:new] = chunk_summaries(
                    queries[row, :, :count], k[row, :, at], v[row, :, at], position,
                    size, call.scaling, self.state.rotary,
                )[0]  # fmt: skip
            rest = queries[row, :, count : count + pending.shape[2]]
            pending[row, :, : rest.shape[2]] = rest
        tensors["chunks"], tensors["pending"] = chunks, pending

    def _queries(self, call: Call, before: list[int]) -> Float[Tensor, "batch heads n dim"]:
        """The queries that no complete chunk holds yet, each row's first ones."""
        pending = self.state.tensors.get("pending", call.q[:, :, :0])
        queries = torch.cat([pending, call.q], dim=2)
        if call.rows.valid is None:
            return queries
        number = torch.arange(pending.shape[2], device=queries.device)
        held = torch.tensor([count % self.size for count in before], device=queries.device)
        there = torch.cat([number < held[:, None], call.ranks[1]], dim=1)
        return left_aligned(queries, there)

    def _tail(self, call: Call, done: list[int]) -> tuple[Tensor, Tensor, list[int]]:
        """(keys, values, where each row's first incomplete chunk begins) of what is not packed."""
        layer = call.cache_layer
        if not isinstance(layer, StoredLayer):
            k, v = (call.rows.aligned(x) for x in (call.k, call.v))
            return k, v, [n * self.size for n in done]
        assert layer.keys is not None
        assert layer.values is not None
        columns = layer.dense_positions() if layer.bodies or layer.index is not None else None
        k, v = (call.rows.aligned(x, columns) for x in (layer.keys, layer.values))
        # Whole chunks are packed as soon as they are complete, once the prompt is over.
        return k, v, [0 if layer.compressed else n * self.size for n in done]


def chunk_summaries(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    v: Float[Tensor, "batch kv_heads tokens v_dim"],
    positions: Int[Tensor, "batch tokens"],
    size: int,
    scaling: float,
    rotary: Rotary | None,
) -> tuple[Float[Tensor, "batch heads chunks dim"], Float[Tensor, "batch heads chunks v_dim"]]:
    """(keys, mean outputs) of whole chunks, from queries and keys rotated to `positions`."""
    local = k
    if rotary is not None:
        inside = torch.arange(k.shape[2], device=k.device) % size
        local = rotary.rotate(rotary.unrotate(k, positions), inside.expand_as(positions))
        local = local.to(k.dtype)
    q, k, v, local = (_by_chunk(x, size) for x in (q, k, v, local))
    # Inside a chunk distances alone count, so that queries and keys may stay as they were rotated.
    mean = ops.attend(q, k, v, scale=scaling).mean(dim=2, keepdim=True)
    keys = ops.attend(mean, local, local, scale=scaling)
    batch = positions.shape[0]
    return (
        keys[:, :, 0].unflatten(0, (batch, -1)).transpose(1, 2),
        mean[:, :, 0].unflatten(0, (batch, -1)).transpose(1, 2),
    )


def gathered(
    x: Float[Tensor, "batch kv_heads slots dim"],
    index: Int[Tensor, "batch heads chunks"],
    size: int,
) -> Float[Tensor, "batch heads chunks {size} dim"]:
    """The slots of chunks chosen by query head, slot 0 of what is not there; reads no other."""
    batch, heads = index.shape[:2]
    row = torch.arange(batch, device=x.device)[:, None, None, None]
    head = torch.arange(heads, device=x.device)[:, None, None] // (heads // x.shape[1])
    at = index.long()[..., None] * size + torch.arange(size, device=x.device)
    return x[row, head, at.clamp(0, x.shape[2] - 1)]


def _by_chunk(x: Float[Tensor, "batch heads tokens dim"], size: int) -> Tensor:
    """[batch · chunks, heads, size, dim]."""
    chunks: Tensor = x.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)
    return chunks
