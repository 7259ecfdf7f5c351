"""What every cache policy has in common: learn from the prompt, score its keys, keep the best.

The prompt is the first call on an empty cache. Its attention is exact; right after it, layer by
layer, the keys are scored and the best n of each row and head stay, in their order. What comes
later is kept, unless `while_decoding` enforces the budget after every call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from attlas.attach.call import Call, Part, Step
from attlas.errors import UserError
from attlas.parts.cache.budget import Budget
from attlas.parts.cache.layer import INDEX_BYTES, CompressedLayer, LayerState
from attlas.parts.cache.rotary import Rotary


@dataclass(frozen=True)
class Slots:
    """What a policy scores: the slots of one layer.

    Attributes:
        keys: as cached (rotated).
        values: as cached.
        valid: the slot holds a token that is no padding.
        column: original column of each slot's token.
        rank: how many real tokens stand before it in its row.
        real: real tokens seen, by row.
        budget: slots to keep, by row.
    """

    keys: Float[Tensor, "batch kv_heads slots dim"]
    values: Float[Tensor, "batch kv_heads slots value_dim"]
    valid: Bool[Tensor, "batch kv_heads slots"]
    column: Int[Tensor, "batch kv_heads slots"]
    rank: Int[Tensor, "batch kv_heads slots"]
    real: Int[Tensor, " batch"]
    budget: Int[Tensor, " batch"]


class CachePolicy(Part):
    """Base of the policies. A subclass gives `scores`, and `learn` when it needs more than keys.

    Args:
        keep: share of the context kept, in (0, 1].
        tokens: or tokens kept.
        bytes: or bytes of the whole cache: keys, values and slot indices of all layers.
        while_decoding: enforce the budget again after every later call, where the policy can.
    """

    #: A policy chooses which pairs may meet.
    stages = ("mask",)
    #: The policy uses the model's rotary embedding.
    rotates = False

    def __init__(
        self,
        keep: float | None = None,
        *,
        tokens: int | None = None,
        bytes: int | None = None,
        while_decoding: bool = False,
    ) -> None:
        self.budget = Budget(keep, tokens, bytes)
        self.while_decoding = while_decoding

    # What a policy defines.

    @property
    def floor(self) -> tuple[str, int]:
        """(name, tokens) of what the budget must at least hold."""
        return "tokens", 1

    @property
    def skipped(self) -> tuple[int, ...]:
        """Layers that stay whole."""
        return ()

    def learn(self, state: LayerState, call: Call) -> None:
        """Gather statistics from a call of the layer, prompt or later."""

    def scores(
        self, state: LayerState, slots: Slots
    ) -> Float[Tensor, "batch kv_heads slots"]:  # fmt: skip
        """How much each slot is worth keeping; higher stays."""
        raise NotImplementedError

    def placed(self, layer: CompressedLayer, real: Int[Tensor, " batch"]) -> None:
        """Called when the layer holds what was kept."""

    # How attach uses it.

    def check(self, model: nn.Module) -> None:
        """Refuse models without full attention to compress, or with a rotation not understood."""
        layers = self.fresh_layers(model)
        full = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
        if not full:
            raise UserError(
                f"{type(self).__name__} compresses full-attention layers; "
                f"{type(model).__name__} has none with a growing cache"
            )
        outside = [i for i in self.skipped if not 0 <= i < len(layers)]
        if outside:
            raise UserError(
                f"skip_layers names layer {outside[0]}; the model has layers 0 to {len(layers) - 1}"
            )
        if set(full) <= set(self.skipped):
            raise UserError(
                f"skip_layers={self.skipped} leaves no layer of the model's {len(layers)} to compress"
            )
        if self.rotates:
            Rotary.of(model, full[0])

    @staticmethod
    def fresh_layers(model: Any) -> list[Any]:
        """The layers that an empty cache of this model comes with."""
        from transformers.cache_utils import DynamicCache

        layers: list[Any] = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
        return layers

    def states(self, layers: list[Any], model: nn.Module) -> dict[int, LayerState]:
        """An empty state for each full-attention layer among an empty cache's layers."""
        full = tuple(i for i, layer in enumerate(layers) if type(layer) is DynamicLayer)
        windows = tuple(
            layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)
        )
        rotary = Rotary.of(model, full[0]) if self.rotates else None
        return {i: LayerState(i, full, windows, rotary) for i in full}

    def cache_layers(self, layers: list[Any], model: nn.Module) -> list[Any]:
        """Compressed layers in place of the full-attention ones; sliding windows stay."""
        states = self.states(layers, model)
        return [CompressedLayer(states[i]) if i in states else x for i, x in enumerate(layers)]

    def begin(self, step: Step) -> None:
        """In a chunked prompt, the first single token ends it: now the layers are compressed."""
        if not (step.chunked and step.length == 1 and step.offset and step.cache is not None):
            return
        for layer in step.cache.layers:
            if isinstance(layer, CompressedLayer) and not layer.compressed:
                self.compress(layer, step.real)

    def observe(self, call: Call) -> None:
        """Learn from a call, and compress when it is the prompt's."""
        layer = call.cache_layer
        if not isinstance(layer, CompressedLayer) or (layer.compressed and not self.while_decoding):
            return
        layer.state.scaling = call.scaling
        self.learn(layer.state, call)
        if layer.compressed or not call.step.chunked:
            self.compress(layer, call.step.real)

    def compress(self, layer: CompressedLayer, real: Bool[Tensor, "batch seen"] | None) -> None:
        """Keep the best slots of a layer and free the rest.

        Raises:
            ValueError: the budget is smaller than what the method must hold.
        """
        layer.compressed = True
        if layer.state.layer in self.skipped:
            return
        slots = self.slots(layer, real)
        held = slots.valid[:, 0].sum(dim=-1).tolist()  # as many in every head
        short = [n for n, m in zip(slots.budget.tolist(), held, strict=True) if n < m]
        if not short:
            return
        name, least = self.floor
        if min(short) < least:
            raise UserError(
                f"the budget {self.budget} is {min(short)} tokens of {int(slots.real.max())}, "
                f"smaller than {name}={least} of {type(self).__name__}; give a larger budget or a "
                f"smaller {name}"
            )
        layer.keep(*best(self.scores(layer.state, slots), slots.valid, slots.budget))
        self.placed(layer, slots.real)

    def slots(self, layer: CompressedLayer, real: Bool[Tensor, "batch seen"] | None) -> Slots:
        """The slots of a layer as `scores` takes them."""
        keys, values, state = layer.keys, layer.values, layer.state
        batch, heads, count, _ = keys.shape
        columns = layer.columns()
        if columns is None:
            columns = torch.arange(count, device=keys.device).expand(batch, heads, count)
        at = columns.clamp(min=0).long() if layer.index is not None else columns
        if real is None:
            total = torch.full((batch,), layer.seen, device=keys.device)
            valid, rank = columns >= 0, at
        else:
            real = real[:, : layer.seen].to(keys.device)
            total = real.sum(dim=-1)
            valid = real[:, None].expand(-1, heads, -1).gather(-1, at) & (columns >= 0)
            rank = (real.cumsum(dim=-1) - 1)[:, None].expand(-1, heads, -1).gather(-1, at)
        budget = self.budget.slots(
            total,
            slot_bytes=heads * (keys.shape[-1] + values.shape[-1]) * keys.element_size(),
            index_bytes=heads * INDEX_BYTES,
            layers=len(state.full),
            whole=len(set(self.skipped) & set(state.full)),
            windows=sum(min(layer.seen, window - 1) for window in state.windows),
        )
        return Slots(keys, values, valid, column=at, rank=rank, real=total, budget=budget)


def best(
    scores: Float[Tensor, "batch kv_heads slots"],
    valid: Bool[Tensor, "batch kv_heads slots"],
    budget: Int[Tensor, " batch"],
) -> tuple[Int[Tensor, "batch kv_heads kept"], Bool[Tensor, "batch kv_heads kept"]]:
    """(slots of the best scores in their order, whether filled), by row and head.

    Equal scores are common: repeated tokens have keys of one norm in the first layer, max pooling
    repeats the largest. Which of them top-k takes depends on where they stand, so padded rows are
    ranked without their padding, and choose as they would alone.
    """
    width = int(budget.max())
    if bool(valid.all()) and int(budget.min()) == width:
        chosen = scores.topk(width, dim=-1).indices.sort(dim=-1).values
        return chosen, torch.ones_like(chosen, dtype=torch.bool)
    chosen = torch.zeros(*scores.shape[:2], width, dtype=torch.long, device=scores.device)
    for row, count in enumerate(budget.tolist()):
        there = valid[row, 0].nonzero()[:, 0]  # padding is the same for all heads
        top = scores[row, :, there].topk(count, dim=-1).indices.sort(dim=-1).values
        chosen[row, :, :count] = there[top]
    place = torch.arange(width, device=scores.device)
    return chosen, (place < budget[:, None, None]).expand_as(chosen)


def real_ranks(
    call: Call,
) -> tuple[Int[Tensor, "batch query"], Bool[Tensor, "batch query"]]:
    """(rank among the row's real tokens, whether it is one) of each query of a call."""
    first, batch = call.step.offset, call.q.shape[0]
    if call.step.real is None:
        rank = call.queries.expand(batch, -1)
        return rank, torch.ones_like(rank, dtype=torch.bool)
    real = call.step.real[:, : first + call.q.shape[2]].to(call.q.device)
    return (real.cumsum(dim=-1) - 1)[:, first:], real[:, first:]
