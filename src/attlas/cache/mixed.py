"""What quantisers of mixed precision share: which tokens were asked for, and parting tokens by class.

A probe is a query that is kept until the next tokens are encoded, to tell what attention they got.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attlas import ops
from attlas.attach.call import Call
from attlas.storage.layer import LayerState, StoredLayer, Taken
from attlas.storage.rows import Rows

#: Probes that are asked at once.
AT_ONCE = 64


def widths(model: nn.Module) -> tuple[int, ...]:
    """Channels of a key head and of a value head, as the model's configuration tells them."""
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if latent := getattr(config, "v_head_dim", None):
        return (config.qk_nope_head_dim + config.qk_rope_head_dim, latent)
    return (width, width)


#: From ranks [batch, n], each row's tokens [batch, 1] and how many it had before this call: which stay.
Rule = Callable[[Tensor, Tensor, Tensor], Tensor]


def remember(state: LayerState, call: Call, rule: Rule) -> None:
    """Keep queries of this call and before as probes, each row by its own tokens.

    Args:
        state: holds them, with their columns, −1 where a row has fewer.
        call: whose queries are new.
        rule: which stay.
    """
    rank, valid = call.ranks
    queries, columns = call.q, torch.where(valid, call.queries, -1)
    count = rank[:, -1:] + 1
    before = count - valid.sum(dim=-1, keepdim=True)
    if "queries" in state.tensors:
        queries = torch.cat([state.tensors["queries"], queries], dim=2)
        rank = torch.cat([call.rows.at(state.tensors["columns"])[1], rank], dim=1)
        columns = torch.cat([state.tensors["columns"], columns], dim=1)
    kept = (columns >= 0) & rule(rank, count, before)
    width = int(kept.sum(dim=-1).max())
    order = (~kept).long().sort(dim=-1, stable=True).indices[:, :width]
    at = order[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[-1])
    columns = torch.where(kept, columns, -1).gather(1, order)
    # Gathered, so that a few probes do not hold on to the queries of a whole prompt.
    state.tensors |= {"queries": queries.gather(2, at), "columns": columns}


def drawn(rank: Int[Tensor, "batch n"], seed: int) -> Float[Tensor, "batch n"]:
    """A number in [0, 1) for each rank, the same however a text is padded or cut into calls."""
    x = (rank.long() + 1) * 0x9E3779B1 + seed * 0x85EBCA6B & 0xFFFFFFFF
    for _ in range(2):
        x = (x ^ (x >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    return (x ^ (x >> 16)).double().float() / 2**32


def attention_paid(
    layer: StoredLayer, state: LayerState, rows: Rows
) -> Iterator[Float[Tensor, "batch kv_heads group probes slots"]]:
    """What the probes pay to the dense slots, some probes at a time; an empty probe pays nothing."""
    keys = layer.keys
    assert keys is not None
    heads, columns = keys.shape[1], layer.dense_positions()
    there = layer.there(rows)
    bodies = [body.segment() for body in layer.bodies.values()]
    for start in range(0, state.tensors["columns"].shape[1], AT_ONCE):
        queries = state.tensors["queries"][:, :, start : start + AT_ONCE]
        asked = state.tensors["columns"][:, start : start + AT_ONCE]
        grouped = rearrange(queries.float(), "b (h g) w d -> b h (g w) d", h=heads)
        logits = grouped @ keys.float().transpose(-1, -2) * state.scaling
        logits = rearrange(logits, "b h (g w) t -> b h g w t", w=asked.shape[1])
        seen = there[:, :, None] & (columns[:, :, None] <= asked[:, None, :, None])
        logits = logits.masked_fill(~seen[:, :, None], -torch.inf)
        lse = logits.logsumexp(dim=-1)
        if bodies:
            other = ops.decode(queries.float(), bodies, scale=state.scaling)[1]
            lse = torch.logaddexp(lse, rearrange(other, "b (h g) w -> b h g w", h=heads))
        yield (logits - lse[..., None]).exp().nan_to_num(0.0)


def spread(
    layer: StoredLayer, x: Float[Tensor, "batch kv_heads slots"]
) -> Float[Tensor, "batch kv_heads seen"]:
    """Numbers of the dense slots, by original positions; 0 for columns that are not there."""
    columns = layer.dense_positions()
    by_column = x.new_zeros(*x.shape[:2], layer.seen + 1)
    at = torch.where(columns >= 0, columns, layer.seen).long()
    return by_column.scatter(-1, at, x)[..., : layer.seen]


def taken_columns(taken: Taken) -> Int[Tensor, "batch kv_heads slots"]:
    """Original positions of every slot taken, −1 for a hole."""
    if taken.index is not None:
        return taken.index
    shape = taken.k.shape
    at = torch.arange(taken.first, taken.first + shape[2], dtype=torch.int32, device=taken.k.device)
    return at.expand(shape[:3])


def parted(taken: Taken, member: Bool[Tensor, "batch kv_heads slots"]) -> Taken | None:
    """The members alone, in their order, each head's first; None where there are none.

    A hole behind a head's last member repeats it, so that it widens no range of a group.
    """
    counts = member.sum(dim=-1)
    width = int(counts.max()) if counts.numel() else 0
    if not width:
        return None
    order = (~member).long().sort(dim=-1, stable=True).indices[..., :width]
    there = torch.arange(width, device=order.device) < counts[..., None]
    last = order.gather(-1, (counts - 1).clamp(min=0)[..., None])
    order = torch.where(there, order, last)
    index = torch.where(there, taken_columns(taken).gather(-1, order), -1).to(torch.int32)
    k, v = (
        x.gather(2, order[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (taken.k, taken.v)
    )
    return replace(taken, k=k, v=v, index=index.contiguous(), first=0)


def greatest(
    worth: Float[Tensor, "batch heads tokens"],
    among: Bool[Tensor, "batch heads tokens"],
    share: float,
) -> Bool[Tensor, "batch heads tokens"]:
    """The ⌊share · n⌋ of greatest worth among n tokens, by row and head."""
    order = worth.masked_fill(~among, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    place = order.argsort(dim=-1)
    return among & (place < (share * among.sum(dim=-1, keepdim=True)).floor())
