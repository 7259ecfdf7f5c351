"""What a ranker of passages looks at: each token's attention, by the type of the tokens attended to.

    S_t(i) = Σ_{j of type t} A_ij        t: marker, query, stop-word, content word;   Σ_t S_t(i) = 1

The text is [CLS] query [SEP] passage [SEP]: markers are known by their ids, what stands before the second
of them is the query, what stands behind it the passage, whose stop-words are known by their ids too.
In the paper markers get most of the attention, and stop-words about as much as other words.

Rankers of the paper's kinds, their tuning on the plays, and the removal of a type of tokens from what
others see are in `attlas.bases.text_ranking`.

Shapes: [layers, batch, heads, tokens, 4], types last.
Cost: one pass over the weights, held a block at a time; four numbers a query.
Source: "Understanding the Behaviors of BERT in Ranking".
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attlas.attach.call import Call, ForwardPass
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.options import option
from attlas.parts.record.rows import RowRecorder, repeated

#: The types, in the order of the last axis.
TYPES = ("marker", "query", "stop", "content")


@mechanism("bert-ranking-attention")
class RankingAttention(RowRecorder):
    """Records the attention of each token to markers, query, stop-words and content words."""

    markers: tuple[int, ...] = option("ids of [CLS] and [SEP]; BERT's unless given", default=(101, 102))
    stops: tuple[int, ...] = option("ids of stop-words; none unless given", default=())

    def check(self, model: nn.Module) -> None:
        """Refuse options with which nothing is a marker."""
        if not self.markers:
            raise UserError("markers takes the ids of [CLS] and [SEP], got none")

    def setup(self) -> None:
        """Nothing is read yet."""
        super().setup()
        self._ids: Tensor | None = None

    def begin(self, forward_pass: ForwardPass) -> None:
        """Tell the types of all tokens so far; rows of a batch are taken to keep their order.

        Raises:
            ValueError: a call whose ids, or whose beginning, are not told.
        """
        super().begin(forward_pass)
        ids, first = forward_pass.ids, forward_pass.offset
        if ids is None:
            raise UserError(f"{type(self).__name__} tells types by token ids; give input_ids")
        if first:
            if self._ids is None or self._ids.shape[1] < first:
                raise UserError(
                    f"{type(self).__name__} has not seen the first {first} tokens, which a cache from "
                    "elsewhere holds; record from the beginning of a text"
                )
            ids = torch.cat([repeated(self._ids[:, :first], len(ids), self).to(ids.device), ids], 1)
        self._ids, valid = ids, forward_pass.valid
        marker = torch.isin(ids, torch.tensor(self.markers, device=ids.device))
        if valid is not None:  # padding may have a marker's id
            marker = marker & valid[:, : ids.shape[1]].to(ids.device)
        stop = torch.isin(ids, torch.tensor(self.stops, device=ids.device, dtype=ids.dtype))
        types = torch.where(marker.cumsum(1) < 2, 1, torch.where(stop, 2, 3))
        self._types: Int[Tensor, "batch columns"] = types.masked_fill(marker, 0)

    def measure(
        self, call: Call, weights: Tensor, queries: Tensor, keys: Tensor
    ) -> Float[Tensor, "batch heads query 4"]:
        """Σ A over the keys of each type; empty slots have no weight."""
        types = self._types.to(weights.device)
        at = keys.clamp(min=0).long()
        if at.ndim == 1:
            own = types[:, at][:, None]
        else:
            own = types[:, None].expand(-1, at.shape[1], -1).gather(-1, at)
        masks = nn.functional.one_hot(own, len(TYPES)).to(weights.dtype)
        return weights @ masks

    def by_type(self) -> Float[Tensor, "layers 4 4"]:
        """Mean shares of each layer, by the type that looks and the type that is looked at.

        Zeros for a type that no token has. Padding does not count: it looks at nothing.
        """
        rows, sums = self.result(), []
        types = self._types.to(rows.device)[:, None, -rows.shape[3] :]
        looking = rows.sum(-1) > 0.5
        for kind in range(len(TYPES)):
            chosen = (looking & (types == kind)).to(rows.dtype)
            total = (rows * chosen[..., None]).sum(dim=(1, 2, 3))
            sums.append(total / chosen.sum(dim=(1, 2, 3)).clamp(min=1)[:, None])
        return torch.stack(sums, dim=1)
