"""A sparse prefill: the prompt attends to its first tokens and the newest, decoding to everything.

    token t of the prompt sees   {0 … s−1} ∪ {t−r+1 … t}

Tokens are counted by each row's own valid ones, so that padding is neither first nor recent. Every call
of several tokens is taken for a prompt or a piece of one, unless its cache has been compressed;
sliding-window layers and models that are not causal stay as they are. Recorders are shown the weights
of full attention.

Cost: n·(s + r) pairs instead of n²/2; blocks without a visible pair are not visited. Where `recent` is
the whole prompt it is full attention.

Source: the pattern of "Efficient Streaming Language Models with Attention Sinks", which "Delta
Attention: Fast and Accurate Sparse Attention Inference by Delta Correction" repairs.
"""

from __future__ import annotations

from typing import Any, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from attlas import masks
from attlas.attach.call import Call
from attlas.attach.part import Selector
from attlas.attach.thinned import Text, density_of, is_prompt, only_causal
from attlas.catalog.registry import mechanism
from attlas.masks import Mask
from attlas.masks.algebra import Reach
from attlas.ops.delta import attend_with_sinks
from attlas.options import option


@mechanism("sparse-prefill", paper="", example={"sinks": 2, "recent": 8})
class SparsePrefill(Selector):
    """Let the prompt's tokens attend to the first ones and to the newest."""

    preset: ClassVar[str] = "prefill"
    #: A pattern chooses which pairs may meet.
    changes = ("mask",)
    everything: ClassVar[dict[str, Any]] = {"recent": 4096}
    comparable: ClassVar[tuple[str, ...]] = ("(recent=512)", "(recent=224)")

    sinks: int = option("first tokens that all see", default=4, at_least=0)
    recent: int = option(
        "newest tokens that each sees, itself included", default=2048, at_least=1, former="window"
    )

    def setup(self) -> None:
        """Make the pattern."""
        super().setup()
        near = masks.window(self.recent)
        self.pattern = masks.causal & (near | masks.sinks(self.sinks) if self.sinks else near)
        #: Of each layer, the share of visible pairs that its last prompt read, a number a head.
        self.density: dict[int, Float[Tensor, " heads"]] = {}

    def attend(self, call: Call) -> Float[Tensor, "batch query heads value_dim"] | None:
        """Attention under the pattern; None where there is no prompt to thin out."""
        if not is_prompt(call):
            return None
        end = call.forward_pass.offset + call.q.shape[2]
        text = Text(call.layer, call.q, call.k[:, :, :end], call.v[:, :, :end], call.scaling)
        self.density[call.layer] = density_of(self.pattern, text)
        heads = attend_with_sinks(
            call.q, call.k, call.v, mask=self._visible(call), score_mod=call.score_mod,
            scale=call.scaling, q_offset=call.forward_pass.offset, sinks=call.sinks,
        )  # fmt: skip
        return heads.transpose(1, 2).contiguous()

    def _visible(self, call: Call) -> Mask | Bool[Tensor, "batch heads query keys"]:
        """The pattern where nothing else is hidden, so that its empty blocks are known; else booleans."""
        pattern: Mask = self.pattern
        if (valid := call.rows.of_keys(call.k.shape[2])) is not None:
            key = ("sparse-prefill", self.sinks, self.recent)
            if key not in call.forward_pass.shared:
                call.forward_pass.shared[key] = Ranked(pattern, valid) & masks.padding(valid)
            pattern = call.forward_pass.shared[key]
        if call.mask is None or only_causal(call):
            return pattern
        sizes = call.q.shape[2], call.k.shape[2]
        seen = masks.dense(pattern, *sizes, q_offset=call.forward_pass.offset, device=call.q.device)
        return seen & call.mask


class Ranked(Mask):
    """A pattern whose positions count each row's valid tokens alone.

    Args:
        inner: the pattern.
        valid: which tokens are no padding.
    """

    def __init__(self, inner: Mask, valid: Bool[Tensor, "batch tokens"]) -> None:
        self.inner, self.heads, self.batch = inner, inner.heads, valid.shape[0]
        self.rank = (valid.cumsum(dim=-1) - 1).clamp(min=0)

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """By the ranks of query and key."""
        rank, last = self.rank.to(q.device), self.rank.shape[1] - 1
        return self.inner.visible(b, h, rank[b, q.clamp(max=last)], rank[b, k.clamp(max=last)])

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        """Ranks grow with positions, so that a block's ends have the ends of its ranks."""
        return self.inner.reach(*(self._at(ends) for ends in (q_lo, q_hi, k_lo, k_hi)))

    def _at(self, ends: Tensor) -> Tensor:
        found = self.rank.to(ends.device)[:, ends.clamp(max=self.rank.shape[1] - 1)]
        return found.reshape(-1, 1, *(1,) * (2 - ends.ndim), *ends.shape)

    def __repr__(self) -> str:
        return f"ranked({self.inner!r})"
