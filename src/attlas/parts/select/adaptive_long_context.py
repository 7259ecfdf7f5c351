"""Adaptive long-context heads: from what is near, and what far keys are like, tell who must look far.

    near:  the first s tokens and the newest r      m_near = log Σ_near exp(q·k/√d)       exact
    far:   the n others, taken as Gaussian          m_far  = log n + q·μ/√d + qᵀ Σ q / (2d)
    a query head reads near tokens alone when  sigmoid(m_near − m_far) ≥ τ,  else everything

μ and Σ are the mean and covariance of a key head's far keys, as they are cached (rotated), gathered from
the prompt and from every token that is no longer recent: d² + d numbers for each key head. Deciding costs
d² products for each query head and the sinks' scores, and reads no far key. With τ = 1 every head
reads everything: full attention; with τ = 0 none does: sinks and the newest tokens.

A head that looks far reads by its own list, so two of one group read their keys twice; the lists of the
others are filled up with −1, which costs their index alone.

Source: "Unveiling Simplicities of Attention: Adaptive Long-Context Head Identification". Statistics of
each chunk, which the paper also tries, are not built.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas.attach.call import Call
from attlas.cache.row import mass_behind, scores_over
from attlas.cache.selection import Selection, first_body, keys_of, lengths_of
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.options import option
from attlas.storage.body import Body
from attlas.storage.layer import Chosen, LayerState, StoredLayer


@mechanism(
    "adaptive-long-context-heads", aliases=("adaptive-heads",),
    example={"sinks": 4, "recent": 4, "page": 4},
)  # fmt: skip
class AdaptiveLongContext(Selection):
    """Let each head read far tokens only when its query seems to need them."""

    without = ("offload", "capacity")
    everything: ClassVar[dict[str, Any]] = {"recent": 4096}
    comparable: ClassVar[tuple[str, ...]] = ("",)

    threshold: float = option(
        "a head stays near when near tokens have at least this share of its mass", default=0.6,
        at_least=0, at_most=1, kw_only=False,
    )  # fmt: skip
    sinks: int = option(
        "first tokens that count as near, a whole number of pages", default=16, at_least=0
    )
    recent: int = option(
        "newest tokens that count as near, beside those that do not fill a block", default=128,
        at_least=0, former="window",
    )  # fmt: skip
    page: int = option("tokens that are packed and listed together", default=16, at_least=1)

    def setup(self) -> None:
        """Refuse sinks that fill no pages."""
        super().setup()
        if self.sinks % self.page:
            raise UserError(
                f"sinks must be a whole number of pages of {self.page}, got {self.sinks}"
            )

    def summarize(self, state: LayerState, body: Body) -> None:
        """Add the keys that are far now to the sums of keys and of their outer products."""
        tensors = state.tensors
        keys, lengths = keys_of(body, 0, 1), lengths_of(body)
        shape = (*keys.shape[:2], keys.shape[-1])
        if lengths is None:
            lengths = torch.full(shape[:2], body.slots, dtype=torch.int32, device=keys.device)
        if "counted" not in tensors:
            tensors["counted"] = torch.full_like(lengths, self.sinks)
            tensors["sum"] = keys.new_zeros(shape, dtype=torch.float32)
            tensors["outer"] = keys.new_zeros(*shape, shape[-1], dtype=torch.float32)
        counted = tensors["counted"]
        start = int(torch.where(lengths > counted, counted, body.slots).min())
        if start >= body.slots:
            return
        number = torch.arange(start, body.slots, device=keys.device)
        new = (number >= counted[..., None]) & (number < lengths[..., None])
        far = keys_of(body, start).float() * new[..., None]
        tensors["sum"] = tensors["sum"] + far.sum(dim=2)
        tensors["outer"] = tensors["outer"] + far.mT @ far
        tensors["counted"] = torch.maximum(counted, lengths)

    def far_mass(
        self, state: LayerState, q: Float[Tensor, "batch heads 1 dim"], scaling: float
    ) -> Float[Tensor, "batch heads"]:
        """What a query's mass on the far keys would be if these were Gaussian; −∞ without any."""
        tensors = state.tensors
        count = tensors["counted"] - self.sinks
        return gaussian_mass(q[:, :, 0].float() * scaling, count, tensors["sum"], tensors["outer"])

    def near_mass(self, layer: StoredLayer, body: Body, call: Call) -> Float[Tensor, "batch heads"]:
        """A query's mass on the sinks and on all that is not packed."""
        behind = mass_behind(layer, call.q, call.scaling, call.rows)
        if not self.sinks:
            return behind
        sinks = scores_over(body, call.q, call.scaling, self.sinks)
        return torch.logaddexp(behind, sinks.logsumexp(-1))

    def choose(self, state: LayerState, body: Body, call: Call) -> Chosen | None:
        """Sinks for the heads that stay near, all pages for the others."""
        near = self.near_mass(call.cache_layer, body, call)
        share = torch.sigmoid(near - self.far_mass(state, call.q, call.scaling))
        looks = share < self.threshold
        if self.threshold == 1:  # a share rounded to 1 would miss the far tokens
            return None
        count = int(looks.sum())
        if count == looks.numel():
            return None
        pages, sinks = -(-body.slots // self.page), self.sinks // self.page
        number = torch.arange(
            max(1, pages if count else sinks), dtype=torch.int32, device=share.device
        )
        index = torch.where(looks[..., None] | (number < sinks), number, -1)
        if not count:  # every head of a group reads the same
            index = index[:, : state.tensors["sum"].shape[1]]
        unread = (looks.numel() - count) * (pages - min(sinks, pages)) if count else 0
        call.forward_pass.shared[self.name, state.layer] = unread
        return Chosen(index, self.page, body.slots, scored=_scored(state))

    def later(self, layer: StoredLayer, state: LayerState, call: Call) -> None:
        """Take what lists were filled up with off the bytes read, then pack what is no longer recent."""
        unread, body = call.forward_pass.shared.get((self.name, state.layer), 0), first_body(layer)
        if unread and body is not None:
            tokens = state.tensors["counted"].numel() * body.slots
            layer.read_bytes -= unread * self.page * body.segment().nbytes // tokens
        super().later(layer, state, call)


def gaussian_mass(
    q: Float[Tensor, "batch heads dim"],
    count: Int[Tensor, "batch kv_heads"],
    total: Float[Tensor, "batch kv_heads dim"],
    outer: Float[Tensor, "batch kv_heads dim dim"],
) -> Float[Tensor, "batch heads"]:
    """log n + q·μ + qᵀ Σ q / 2 of `count` keys with this sum and sum of outer products.

    Args:
        q: queries, scaled.
        count: how many keys; −∞ where there is none.
        total: their sum.
        outer: the sum of k kᵀ.
    """
    n = count.clamp(min=1)[..., None].float()
    mean = total / n
    grouped = q.unflatten(1, (mean.shape[1], -1))
    first = torch.einsum("bhgd,bhd->bhg", grouped, mean)
    second = torch.einsum("bhgd,bhde,bhge->bhg", grouped, outer / n[..., None], grouped)
    mass = n.log() + first + (second - first.square()).clamp(min=0) / 2
    return mass.masked_fill((count <= 0)[..., None], -torch.inf).flatten(1)


def _scored(state: LayerState) -> int:
    """Bytes that a decision reads: the statistics. (The near tokens are read anyway.)"""
    return sum(t.nbytes for t in state.tensors.values())
