"""Queries that are remembered, each row's by its own tokens, and what they attend to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from attlas.attach.call import Call
from attlas.cache.policy import Slots
from attlas.storage.layer import LayerState

#: From ranks [batch, n], each row's tokens [batch, 1] and how many it had before this call: which stay.
Rule = Callable[[Tensor, Tensor, Tensor], Tensor]


def remember(state: LayerState, call: Call, rule: Rule) -> None:
    """Keep queries of this call and before, each row by its own tokens.

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
    # Gathered, so that a few queries do not hold on to those of a whole prompt.
    state.tensors |= {"queries": queries.gather(2, at), "columns": columns}


def drawn(rank: Int[Tensor, "batch n"], seed: int) -> Float[Tensor, "batch n"]:
    """A number in [0, 1) for each rank, the same however a text is padded or cut into calls."""
    x = (rank.long() + 1) * 0x9E3779B1 + seed * 0x85EBCA6B & 0xFFFFFFFF
    for _ in range(2):
        x = (x ^ (x >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    return (x ^ (x >> 16)).double().float() / 2**32


def asked_weights(
    state: LayerState, slots: Slots
) -> Float[Tensor, "batch kv_heads group queries slots"]:
    """Weights of the remembered queries over the slots, causal among themselves.

    The weights of a query that is not there, of column −1, mean nothing. They take more memory than the
    keys do: so they are made in their own place, with the keys of one head at a time as float32.
    """
    queries, columns = state.tensors["queries"], state.tensors["columns"]
    keys, width = slots.keys, columns.shape[1]
    grouped = rearrange(
        queries.float() * state.scaling, "b (h g) w d -> h b (g w) d", h=keys.shape[1]
    )
    logits = grouped.new_empty(len(keys), keys.shape[1], grouped.shape[2] // width, width, keys.shape[2])
    for head, asking in enumerate(grouped):
        logits[:, head] = (asking @ keys[:, head].float().mT).unflatten(1, (-1, width))
    asked = columns >= 0
    # No slot before the first asked query lies in anyone's future: slots are in order.
    first = int(columns.clamp(min=0).min())
    late = slots.original_position[:, :, None, first:] > columns[:, None, :, None]
    logits[..., first:].masked_fill_((late & asked[:, None, :, None])[:, :, None], -torch.inf)
    if not slots.valid.all():
        logits.masked_fill_(~slots.valid[:, :, None, None], -torch.inf)
    logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()
    return logits.div_(logits.sum(dim=-1, keepdim=True))
