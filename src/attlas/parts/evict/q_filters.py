"""Q-filters: queries of a head lean one way; keys that lie along it get the attention, and stay.

    v      = the unit vector that maximises Σ_q (q·v)²       over calibration queries, not centred
    s      = +1 if q·v > 0 for more than half of them, else −1
    f      = −mean of s·v over the query heads of a key head
    score(j) = −f·k_j                                         of the key as cached, rotated

The mean of unit vectors is not made a unit vector again. The most recent tokens always stay. v is the
first right singular vector of the matrix of queries, hence the first eigenvector of Σ q qᵀ, which is
a running sum; q·v > 0 says that the entry of the left singular vector is positive. v is known only
when all has been read, so the signs are counted over a sample of the queries, which calibration
keeps: a fixed number per head, each query as likely as any other. The published recipe takes both
from a sample of 3000.

Cost: one product per key; no attention weight is computed, and no query is looked at once the filters
are known. Keeps everything, hence reduces to full attention, at keep = 1.

Source: "Q-Filters: Leveraging QK Geometry for Efficient KV Cache Compression".
"""

from __future__ import annotations

from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attlas.attach.call import Call
from attlas.cache.policy import CachePolicy, Slots
from attlas.calibration.parts import Calibrated, Calibrator
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.options import option
from attlas.storage.layer import LayerState

#: Queries of each head that are kept to count signs.
SAMPLES = 512


class QueryDirections(Calibrator):
    """Gathers Σ q qᵀ of every query head, and a sample of the queries."""

    def observe(self, call: Call) -> None:
        """Add the queries of a call that are no padding."""
        heads = call.k.shape[1]
        queries = rearrange(call.q.float(), "b (h g) t d -> b t h g d", h=heads)
        valid = call.valid
        queries = queries.flatten(0, 1) if valid is None else queries[valid]
        self.add(f"{call.layer}.squares", torch.einsum("thgd,thge->hgde", queries, queries))
        self._sample(f"{call.layer}.sample", f"{call.layer}.lot", queries)
        self.add(f"{call.layer}.count", torch.tensor(len(queries)))

    def _sample(self, name: str, lot_name: str, queries: Tensor) -> None:
        """Those with the highest lots stay; a lot rests on how many queries were read before."""
        read = int(self.sums.get(name.replace("sample", "count"), torch.tensor(0)))
        lots = torch.rand(len(queries), generator=torch.Generator().manual_seed(read))
        if name in self.sums:
            queries = torch.cat([self.sums[name].to(queries.device), queries])
            lots = torch.cat([self.sums[lot_name], lots])
        best = lots.topk(min(SAMPLES, len(lots))).indices
        self.sums[name], self.sums[lot_name] = queries[best.to(queries.device)], lots[best]

    def tensors(self) -> dict[str, Tensor]:
        """A filter per layer and key head: "3.filter" [kv_heads, dim].

        Raises:
            ValueError: nothing was read.
        """
        layers = sorted(int(n.split(".")[0]) for n in self.sums if n.endswith(".squares"))
        if not layers:
            raise UserError("no query was seen; calibrate on at least one text")
        return {
            f"{i}.filter": _filter(self.sums[f"{i}.squares"], self.sums[f"{i}.sample"])
            for i in layers
        }


def _filter(
    squares: Float[Tensor, "kv_heads groups dim dim"],
    sample: Float[Tensor, "samples kv_heads groups dim"],
) -> Float[Tensor, "kv_heads dim"]:
    direction = torch.linalg.eigh(squares.double().cpu()).eigenvectors[..., -1]
    along = torch.einsum("thgd,hgd->thg", sample.double().cpu(), direction)
    sign = torch.where((along > 0).double().mean(dim=0) > 0.5, 1.0, -1.0)
    filters: Tensor = -(sign[..., None] * direction).mean(dim=1)
    return filters.float()


@mechanism("q-filters", aliases=("qfilters",), example={"keep": 0.5, "recent": 4})
class QFilters(Calibrated, CachePolicy):
    """Keep the keys that lie most along the direction in which the queries of a head lean."""

    beyond = ("mask: later queries do not meet the keys that were dropped",)
    comparable: ClassVar[tuple[str, ...]] = ("(keep=0.5)", "(keep=0.25)", "(keep=0.125)")

    recent: int = option("newest tokens that always stay", default=64, at_least=0, former="window")

    @property
    def floor(self) -> tuple[str, int]:
        """The recent tokens."""
        return "recent", self.recent

    def calibrator(self) -> QueryDirections:
        """The same filters serve every budget."""
        return QueryDirections()

    def check(self, model: nn.Module) -> None:
        """Refuse filters that a full-attention layer of the model has none of."""
        super().check(model)
        for number in self.states(self.fresh_layers(model), model):
            if f"{number}.filter" not in self.statistics:
                raise UserError(f"the calibration holds no filter for layer {number}")

    def scores(self, state: LayerState, slots: Slots) -> Float[Tensor, "batch kv_heads slots"]:
        """The product of each key with the direction of its queries; the recent ones come first."""
        filters = self.statistics[f"{state.layer}.filter"]
        scores = -torch.einsum("bhtd,hd->bht", slots.keys.float(), filters)
        recent = (slots.rank >= (slots.total - self.recent)[:, None, None]) & slots.valid
        return scores.masked_fill(recent, torch.inf)
