"""What every cache policy has in common: learn from the prompt, score its keys, keep the best.

When the prompt is over the keys are scored and the best n of each row and head stay, in their order.
What comes later is kept, unless `while_decoding` enforces the budget after every call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attlas.attach.call import Call
from attlas.cache.budget import Budget
from attlas.cache.part import CachePart, Role
from attlas.errors import UserError
from attlas.options import option
from attlas.storage.layer import INDEX_BYTES, LayerState, StoredLayer
from attlas.storage.rows import Rows
from attlas.storage.slots import first_ones


@dataclass(frozen=True)
class Slots:
    """What a policy scores: the slots of one layer.

    Attributes:
        keys: as cached (rotated).
        values: as cached.
        valid: the slot holds a token that is no padding.
        original_position: of each slot's token.
        rank: how many valid tokens stand before it in its row.
        total: valid tokens seen, by row.
        budget: slots to keep, by row.
    """

    keys: Float[Tensor, "batch kv_heads slots dim"]
    values: Float[Tensor, "batch kv_heads slots value_dim"]
    valid: Bool[Tensor, "batch kv_heads slots"]
    original_position: Int[Tensor, "batch kv_heads slots"]
    rank: Int[Tensor, "batch kv_heads slots"]
    total: Int[Tensor, " batch"]
    budget: Int[Tensor, " batch"]


class CachePolicy(CachePart):
    """Base of the policies. A subclass gives `scores`, and `learn` when it needs more than keys."""

    #: A policy chooses which pairs may meet.
    changes: ClassVar[tuple[str, ...]] = ("mask",)
    role: ClassVar[Role] = "evict"
    joins: ClassVar[tuple[Role, ...]] = ("quantize", "select")
    everything: ClassVar[dict[str, Any] | None] = {"keep": 1.0}
    keep: float | None = option(
        "share of the context kept, what always stays included", default=None, above=0, at_most=1,
        kw_only=False,
    )  # fmt: skip
    tokens: int | None = option(
        "or tokens kept, on average over the layers", default=None, at_least=1
    )
    bytes: int | None = option(
        "or bytes of the whole cache: keys, values and slot indices of all layers", default=None,
        at_least=1,
    )  # fmt: skip
    while_decoding: bool = option("enforce the budget again after every later call", default=False)

    def setup(self) -> None:
        """Understand the budget."""
        self.budget = Budget(self.keep, self.tokens, self.bytes)

    # What a policy defines.

    @property
    def floor(self) -> tuple[str, int]:
        """(name, tokens) of what the budget must at least hold."""
        return "tokens", 1

    @property
    def skipped(self) -> tuple[int, ...]:
        """Layers that stay whole."""
        return ()

    def scores(
        self, state: LayerState, slots: Slots
    ) -> Float[Tensor, "batch kv_heads slots"]:  # fmt: skip
        """How much each slot is worth keeping; higher stays."""
        raise NotImplementedError

    def budgets(self, state: LayerState, slots: Slots) -> Int[Tensor, " batch"]:
        """Slots to keep in this layer, by row; the same in every layer unless a policy says otherwise."""
        return slots.budget

    def drop(self, layer: StoredLayer, slots: Slots, scores: Float[Tensor, "b h slots"]) -> None:
        """Hold the best slots of every head alone."""
        layer.keep(*best_slots(scores, slots.valid, slots.budget))

    def placed(self, layer: StoredLayer, state: LayerState, total: Int[Tensor, " batch"]) -> None:
        """Called when the layer holds what was kept."""

    @property
    def rewinds(self) -> bool:
        """Whether nothing is dropped after the prompt."""
        return not self.while_decoding

    # How attach uses it.

    def check(self, model: nn.Module) -> None:
        """Refuse models without full attention to compress, or with a rotation not understood."""
        super().check(model)
        layers = self.fresh_layers(model)
        full = set(self.states(layers, model))
        outside = [i for i in self.skipped if not 0 <= i < len(layers)]
        if outside:
            raise UserError(
                f"skip_layers names layer {outside[0]}; the model has layers 0 to {len(layers) - 1}"
            )
        if full <= set(self.skipped):
            raise UserError(
                f"skip_layers={self.skipped} leaves no layer of the model's {len(layers)} to compress"
            )
        name, least = self.floor
        if self.while_decoding and (self.budget.tokens or least) < least:
            raise UserError(
                f"the budget {self.budget} is smaller than {name}={least} of {type(self).__name__}; give "
                f"a larger budget or a smaller {name}"
            )

    def compress(self, layer: StoredLayer, state: LayerState, rows: Rows) -> None:
        """Keep the best slots of a layer and free the rest.

        Raises:
            ValueError: the budget is smaller than what the method must hold.
        """
        if state.layer not in self.skipped:
            self._keep_best(layer, state, rows)
        if not self.while_decoding:
            state.tensors.clear()

    def later(self, layer: StoredLayer, state: LayerState, call: Call) -> None:
        """Enforce the budget again, where that was asked for."""
        if self.while_decoding:
            self.learn(state, call)
            self.compress(layer, state, call.rows)

    @property
    def captures(self) -> bool:
        """A budget for the prompt alone leaves later steps as they are."""
        return type(self).later is CachePolicy.later and not self.while_decoding and self._silent()

    def _keep_best(self, layer: StoredLayer, state: LayerState, rows: Rows) -> None:
        slots = self.slots(layer, state, rows)
        held = slots.valid[:, 0].sum(dim=-1).tolist()  # as many in every head
        short = [n for n, m in zip(slots.budget.tolist(), held, strict=True) if n < m]
        if not short:
            return
        self._check_floor(slots, held)
        self.drop(layer, slots, self.scores(state, slots))
        layer.fixed = layer.seen
        self.placed(layer, state, slots.total)

    def slots(self, layer: StoredLayer, state: LayerState, rows: Rows) -> Slots:
        """The slots of a layer as `scores` takes them."""
        keys, values = layer.keys, layer.values
        assert keys is not None
        assert values is not None
        batch, heads, count, _ = keys.shape
        columns = layer.original_positions()
        if columns is None:
            columns = torch.arange(count, device=keys.device).expand(batch, heads, count)
        at = columns.clamp(min=0).long() if layer.index is not None else columns
        valid, rank = rows.at(columns)
        total = rows.totals(batch, keys.device)
        budget = self.budget.slots(
            total,
            slot_bytes=heads * (keys.shape[-1] + values.shape[-1]) * keys.element_size(),
            index_bytes=heads * INDEX_BYTES,
            layers=len(state.full),
            whole=len(set(self.skipped) & set(state.full)),
            windows=sum(min(layer.seen, window - 1) for window in state.windows),
        )
        slots = Slots(
            keys, values, valid, original_position=at, rank=rank, total=total, budget=budget
        )
        return replace(slots, budget=self._at_least(self.budgets(state, slots), total))

    def _at_least(
        self, budget: Int[Tensor, " batch"], total: Int[Tensor, " batch"]
    ) -> Int[Tensor, " batch"]:
        """Budgets, of which a share is never less than what the method must hold.

        A row no longer than that keeps everything; a longer one is refused, unless the text grows call
        by call and will be long enough.
        """
        if self.budget.keep is None:
            return budget
        least = self.floor[1]
        short = torch.ones_like(total, dtype=torch.bool) if self.while_decoding else total <= least
        return torch.where(short, budget.maximum(total.clamp(max=least)), budget)

    def _check_floor(self, slots: Slots, held: list[int]) -> None:
        """Refuse budgets below what the method must hold.

        Raises:
            ValueError: by the row's own length.
        """
        name, least = self.floor
        rows = zip(slots.budget.tolist(), held, slots.total.tolist(), strict=True)
        for row, (budget, there, total) in enumerate(rows):
            if budget < there and budget < least:
                of = f"the {total} of row {row}" if len(held) > 1 else str(total)
                raise UserError(
                    f"the budget {self.budget} is {budget} tokens of {of}, smaller than {name}={least} "
                    f"of {type(self).__name__}; give a larger budget or a smaller {name}"
                )


def best_slots(
    scores: Float[Tensor, "batch kv_heads slots"],
    valid: Bool[Tensor, "batch kv_heads slots"],
    budget: Int[Tensor, " batch"],
) -> tuple[Int[Tensor, "batch kv_heads kept"], Bool[Tensor, "batch kv_heads kept"]]:
    """(slots of the best scores in their order, whether filled), by row and head.

    Equal scores are common: repeated tokens have keys of one norm in the first layer, max pooling
    repeats the largest. The earlier slot goes first, so that a row chooses the same on every device
    and beside any other rows.
    """
    ranked = scores.argsort(dim=-1, descending=True, stable=True)
    there = valid.gather(-1, ranked)
    best = there & (there.cumsum(-1) <= budget[:, None, None])
    return first_ones(torch.zeros_like(valid).scatter(-1, ranked, best))
