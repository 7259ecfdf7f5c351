"""A cache layer that holds fewer tokens than it has seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from attlas.errors import UserError
from attlas.parts.cache.rotary import Rotary

#: A slot's original column is kept as int32 beside its key and value.
INDEX_BYTES = 4


@dataclass
class LayerState:
    """What a policy knows of one layer of one cache.

    Attributes:
        layer: index of the layer.
        full: the model's full-attention layers.
        windows: lengths of the model's sliding-window layers.
        rotary: how the model rotates, None when the policy does not ask or it does not rotate.
        scaling: factor of q·k, known after the first call.
        tensors: statistics gathered from the calls, batch first.
    """

    layer: int
    full: tuple[int, ...]
    windows: tuple[int, ...] = ()
    rotary: Rotary | None = None
    scaling: float = 1.0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def fork(self) -> LayerState:
        """A copy that shares the tensors, which are never written to."""
        return LayerState(
            self.layer, self.full, self.windows, self.rotary, self.scaling, dict(self.tensors)
        )


class CompressedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values in slots, of which the first may be a selection of the context.

    `get_seq_length` and `get_mask_sizes` speak of the tokens seen, so that Transformers counts
    positions and builds masks in original coordinates; attlas's attention function takes of a mask
    the columns that the slots hold.

    Attributes:
        index: int32 [batch, kv_heads, n], original columns of the first n slots, -1 for an empty
            one; None while nothing was dropped. Slots behind them hold the last tokens in order.
        seen: tokens seen, padding included.
        ragged: some row has empty slots.
        compressed: the prompt is over and the budget has been enforced.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, state: LayerState) -> None:
        super().__init__()
        self.state = state
        self.index: Tensor | None = None
        self.seen = 0
        self.ragged = False
        self.compressed = False

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens; gives all keys and values held."""
        self.seen += key_states.shape[-2]
        held: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return held

    def get_seq_length(self) -> int:
        """Tokens seen, not held."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the mask: the whole sequence, in original columns."""
        return self.seen + query_length, 0

    def columns(self) -> Int[Tensor, "batch kv_heads slots"] | None:
        """Original column of every slot, None while nothing was dropped."""
        if self.index is None:
            return None
        batch, heads, chosen = self.index.shape
        first = self.seen - (self.keys.shape[-2] - chosen)
        tail = torch.arange(first, self.seen, dtype=torch.int32, device=self.index.device)
        return torch.cat([self.index, tail.expand(batch, heads, -1)], dim=-1)

    def keep(
        self, slots: Int[Tensor, "batch kv_heads n"], filled: Bool[Tensor, "batch kv_heads n"]
    ) -> None:
        """Hold the given slots alone; where not `filled` the slot is empty. Frees the rest."""
        columns = self.columns()
        chosen = slots if columns is None else columns.gather(-1, slots)
        self.index = torch.where(filled, chosen, -1).to(torch.int32)
        self.ragged = not bool(filled.all())
        at = slots[..., None]
        self.keys = self.keys.gather(2, at.expand(-1, -1, -1, self.keys.shape[-1]))
        self.values = self.values.gather(2, at.expand(-1, -1, -1, self.values.shape[-1]))

    def reset(self) -> None:
        """Forget everything; the next call is a new prompt."""
        super().reset()
        self.index, self.seen, self.ragged, self.compressed = None, 0, False, False
        self.state.tensors.clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens (a negative number), of those that came after compression.

        Raises:
            ValueError: so many that the compressed context would be touched.
        """
        chosen = 0 if self.index is None else self.index.shape[-1]
        tail = self.keys.shape[-2] - chosen if self.is_initialized else 0
        if tokens_to_remove < 0 and self.index is not None and -tokens_to_remove > tail:
            raise UserError(
                f"crop({tokens_to_remove}) reaches into the compressed context; only the last "
                f"{tail} tokens can be taken back"
            )
        super().crop(tokens_to_remove)
        self.seen -= abs(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, as beam search asks."""
        super().reorder_cache(beam_idx)
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times."""
        super().batch_repeat_interleave(repeats)
        self._rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only some rows."""
        super().batch_select_indices(indices)
        self._rows(lambda x: x[indices])

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.index is not None:
            self.index = change(self.index)
        self.state.tensors = {name: change(x) for name, x in self.state.tensors.items()}
