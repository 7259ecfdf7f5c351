"""Expected attention: keep what the queries to come are expected to read.

Queries before rotation are taken for Gaussian, N(μ, Σ) per head, over the prompt's tokens behind the
sinks. With R the mean rotation over the next m positions and logits q·k/√d,

    E exp(q·k/√d) = exp( (Rμ)·k/√d + kᵀ (R Σ Rᵀ) k/(2d) )
    score         = (mean over a key head's query heads of softmax_k(·) + ε) · ‖v‖

and the first tokens always stay. Cost: a covariance per query head and a quadratic form per key.
Keeps everything, hence reduces to full attention, at keep = 1.

Source: "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
Distribution".
"""

from __future__ import annotations

from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from attlas.attach.call import Call
from attlas.cache.policy import CachePolicy, Slots
from attlas.catalog.registry import mechanism
from attlas.options import option
from attlas.storage.layer import LayerState
from attlas.storage.rotary import Angles, Rotary


@mechanism("expected-attention", example={"keep": 0.5})
class ExpectedAttention(CachePolicy):
    """Keep the keys that future queries are expected to attend to."""

    rotates = True
    beyond = ("mask: later queries do not meet the keys that were dropped",)
    comparable: ClassVar[tuple[str, ...]] = ("(keep=0.5)", "(keep=0.25)", "(keep=0.125)")

    n_future: int = option("positions over which the rotation is averaged", default=512, at_least=1)
    sinks: int = option(
        "first tokens that always stay and are left out of the statistics", default=4, at_least=0
    )
    use_covariance: bool = option(
        "take the spread of the queries into account, not only their mean", default=True
    )
    use_vnorm: bool = option("weigh by the norm of the values", default=True)
    epsilon: float = option("added to the expected weight before the values' norm", default=0.0)

    @property
    def floor(self) -> tuple[str, int]:
        """The sinks."""
        return "sinks", self.sinks

    def learn(self, state: LayerState, call: Call) -> None:
        """Count, mean and summed squares of the un-rotated queries, call after call.

        Two lots of n_a and n_b with means apart by δ join as M = M_a + M_b + δδᵀ n_a n_b / n.
        """
        tensors = state.tensors
        weight, positions = self._asked(call)
        fresh = weight.sum(dim=-1)[:, None, None]  # [batch, 1, 1]
        queries = call.q.float()
        if state.rotary is not None:
            cos, sin = self._angles(state.rotary, call, positions, tensors)
            queries = state.rotary.turn(queries, cos, sin)
        mean = torch.einsum("bhtd,bt->bhd", queries, weight) / fresh.clamp(min=1)
        if self.use_covariance:
            centred = (queries - mean[:, :, None]).mul_(weight[:, None, :, None])
            squares = centred.transpose(-1, -2) @ centred
        if "mean" in tensors:
            delta = mean - tensors["mean"]
            share = fresh / (tensors["count"] + fresh).clamp(min=1)
            if self.use_covariance:
                between = delta[..., :, None] * delta[..., None, :]
                squares += tensors["squares"] + between * (share * tensors["count"])[..., None]
            mean = tensors["mean"] + delta * share
            fresh = tensors["count"] + fresh
        if self.use_covariance:
            tensors["squares"] = squares
        tensors |= {"mean": mean, "count": fresh}

    def _asked(
        self, call: Call
    ) -> tuple[Float[Tensor, "batch query"], Int[Tensor, "batch query"]]:  # fmt: skip
        """(1 for the queries that count, positions with -1 for padding), once for all layers."""
        shared = call.forward_pass.shared
        if (key := ("asked", self.sinks)) not in shared:
            rank, valid = call.ranks
            weight = (valid & (rank >= self.sinks)).float()
            shared[key] = weight, call.positions.masked_fill(~valid, -1)
        found: tuple[Tensor, Tensor] = shared[key]
        return found

    def _angles(
        self, rotary: Rotary, call: Call, positions: Tensor, tensors: dict[str, Tensor]
    ) -> Angles:
        """What undoes the queries' rotation, once for all layers; keeps the mean rotation to come."""
        shared = call.forward_pass.shared
        if (key := ("angles", self.n_future, rotary)) not in shared:
            cos, sin = rotary.back(call.positions)
            ahead = positions.amax(dim=-1) + 1
            if "next" in tensors:
                ahead = torch.maximum(tensors["next"], ahead)
            later = torch.arange(self.n_future, device=positions.device)
            mean = [x.float().mean(dim=1) for x in rotary.angles(ahead[:, None] + later)]
            shared[key] = (
                (cos[:, None], sin[:, None]),
                {"cos": mean[0], "sin": mean[1], "next": ahead},
            )
        back: Angles
        back, future = shared[key]
        tensors |= future
        return back

    def scores(self, state: LayerState, slots: Slots) -> Float[Tensor, "batch kv_heads slots"]:
        """The expected weight of each key, times the norm of its value."""
        mean, covariance = self._future(state)
        heads = slots.keys.shape[1]
        keys = slots.keys.float()
        mean = rearrange(mean * state.scaling, "b (h g) d -> b h g d", h=heads)
        logits = torch.einsum("bhgd,bhtd->bhgt", mean, keys)
        if covariance is not None:
            spread = rearrange(
                covariance * (state.scaling**2 / 2), "b (h g) d e -> b h g d e", h=heads
            )
            logits += (keys[:, :, None] @ spread).mul_(keys[:, :, None]).sum(dim=-1)
        sinks = (slots.rank < self.sinks) & slots.valid
        logits = logits.masked_fill((sinks | ~slots.valid)[:, :, None], -torch.inf)
        scores = logits.softmax(dim=-1).nan_to_num(nan=0.0).mean(dim=2)  # NaN: nothing but sinks
        if self.use_vnorm:
            scores = (scores + self.epsilon) * slots.values.float().norm(dim=-1)
        best = scores.masked_fill(sinks | ~slots.valid, 0.0).max().item()
        return scores.masked_fill(sinks, best + 1)

    def _future(
        self, state: LayerState
    ) -> tuple[
        Float[Tensor, "batch heads dim"], Float[Tensor, "batch heads dim dim"] | None
    ]:  # fmt: skip
        """Mean and covariance of the queries to come, rotated by the mean rotation."""
        tensors = state.tensors
        mean = tensors["mean"]
        covariance = None
        if self.use_covariance:
            covariance = tensors["squares"] / tensors["count"].clamp(min=1)[..., None]
        if state.rotary is not None:
            cos, sin = tensors["cos"][:, None], tensors["sin"][:, None]
            turn = state.rotary.turn
            mean = turn(mean, cos, sin)
            if covariance is not None:
                cos, sin = cos[:, None], sin[:, None]
                covariance = turn(covariance, cos, sin).transpose(-1, -2)
                covariance = turn(covariance, cos, sin)
        return mean, covariance
