"""What quantisers of mixed precision share: what the probes attend to, and parting tokens by class.

A probe is a query that is remembered until the next tokens are encoded, to tell what attention they get.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attlas import ops
from attlas.cache.quantizer import Quantizer, offered
from attlas.hf.sources import layouts
from attlas.ops.quantize import check
from attlas.options import option
from attlas.storage.body import Body
from attlas.storage.layer import LayerState, StoredLayer, Taken
from attlas.storage.packed import PackedBody
from attlas.storage.rows import Rows

#: Probes that are asked at once.
AT_ONCE = 64
#: Classes of tokens by name: which tokens, and in how many bits they are held.
Classes = Mapping[str, tuple[Bool[Tensor, "batch kv_heads slots"], int]]


class MixedQuantizer(Quantizer):
    """Base of the quantisers that hold salient tokens in more bits than others.

    A subclass gives `precisions`, `worth`, `classes` and `coded`.
    """

    salient_bits: int = option(
        "bits of salient tokens: 16 (as they are), 8, 4, 3, 2 or 1", default=4
    )

    def setup(self) -> None:
        """Refuse bits that numbers cannot be held in."""
        super().setup()
        offered(**self.precisions())

    # What a subclass defines.

    def precisions(self) -> dict[str, int]:
        """Bits of the classes of tokens, by the option that says them."""
        raise NotImplementedError

    def worth(
        self, layer: StoredLayer, state: LayerState, rows: Rows
    ) -> Float[Tensor, "batch kv_heads slots"]:
        """How salient the token of each dense slot is."""
        raise NotImplementedError

    def classes(
        self,
        state: LayerState,
        taken: Taken,
        worth: Float[Tensor, "batch kv_heads slots"],
        valid: Bool[Tensor, "batch kv_heads slots"],
    ) -> Classes:
        """Which of the tokens taken belong together, and their bits."""
        raise NotImplementedError

    def coded(self, state: LayerState, taken: Taken, bits: int) -> Body:
        """The body of a class of fewer than 16 bits."""
        raise NotImplementedError

    # How the cache uses it.

    def formats(self, model: nn.Module) -> None:
        """Refuse heads whose codes would not fill whole bytes."""
        for width in widths(model):
            for bits in set(self.precisions().values()) - {16}:
                check(bits, width, 1, 1)

    def compress(self, layer: StoredLayer, state: LayerState, rows: Rows) -> None:
        """Say who is salient, and encode all but the newest tokens."""
        if max(layer.lengths(rows), default=0) - self.recent < self.block:
            return
        state.tensors["worth"] = spread(layer, self.worth(layer, state, rows))
        super().compress(layer, state, rows)
        del state.tensors["worth"]

    def encode(self, state: LayerState, taken: Taken) -> dict[str, Body]:
        """A body for each class that has tokens."""
        columns = taken_columns(taken)
        worth = state.tensors["worth"].gather(-1, columns.clamp(min=0).long())
        bodies: dict[str, Body] = {}
        for name, (members, bits) in self.classes(state, taken, worth, columns >= 0).items():
            part = parted(taken, members)
            if part is not None:
                whole = bits == 16
                bodies[name] = (
                    PackedBody(part.k, part.v, part.index)
                    if whole
                    else self.coded(state, part, bits)
                )
        return bodies


def widths(model: nn.Module) -> tuple[int, ...]:
    """Channels of what the layers cache, each number that occurs once."""
    return tuple(dict.fromkeys(width for layout in layouts(model) for width in layout))


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
