"""Massive values: dimensions of queries and keys that are large in every token.

    M_hd = ‖x_{1…T, h, d}‖₂      of q and k (rotated) and v;  massive where M_hd > 5 mean_d M_hd

The same norm of each channel of the residual stream is told beside them. The intervention replaces, while
a prompt is read, the dimensions of largest (or smallest) norm of every head's queries and keys by the
mean of their entries; what the cache holds, and values, stay as they are.

Cost: one number a dimension and head. Reduces to the model alone at dimensions = 0.

Source: "Massive Values in Self-Attention Modules are the Key to Contextual Knowledge Understanding".
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attlas.attach.call import Call, Site
from attlas.attach.part import Patch
from attlas.attach.where import Heads
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.options import option
from attlas.parts.record.sums import SumRecorder

#: How far above a head's mean norm a dimension is massive; the paper's.
RATIO = 5.0


@mechanism("massive-values")
class MassiveValues(SumRecorder):
    """Records norms over the tokens of one sequence, by dimension.

    The result is {"q": [layers, batch, heads, dim], "k" and "v": [layers, batch, kv_heads, dim],
    "residual": [layers, batch, width]}, of what enters each layer's block.
    """

    changes = ("project",)
    points = ("residual",)
    without = ("heads",)  # norms of all heads are recorded

    def observe(self, call: Call) -> None:
        """Add up the squares of this call's queries, keys and values."""
        tokens, valid = call.q.shape[2], call.valid
        for name, x in (
            ("q", call.q),
            ("k", call.k[:, :, -tokens:]),
            ("v", call.v[:, :, -tokens:]),
        ):
            x = x.float() if valid is None else x.float() * valid[:, None, :, None]
            self._add(name, call.layer, x.square(), axis=2)

    @torch.no_grad()
    def stream(self, site: Site, x: Float[Tensor, "batch query width"]) -> None:
        """Add up the squares of the residual stream."""
        forward_pass = site.forward_pass
        if forward_pass.valid is not None:
            valid = forward_pass.valid[
                :, forward_pass.offset : forward_pass.offset + x.shape[1]
            ].to(x.device)
            x = x * valid[..., None]
        self._add("residual", site.layer, x.float().square(), axis=1)

    def _add(self, name: str, layer: int, squares: Tensor, axis: int) -> None:
        self.add((name, layer), squares.sum(dim=axis), lambda: list(squares.unbind(axis)))

    def result(self) -> dict[str, Tensor]:
        """The norms."""
        found: defaultdict[str, list[Tensor]] = defaultdict(list)
        for name, layer in sorted(self._sums):
            found[name].append(self._sums[name, layer])
        return {name: torch.stack(layers).sqrt() for name, layers in found.items()}

    def massive(self, ratio: float = RATIO) -> dict[str, Bool[Tensor, "*rows dim"]]:
        """Which dimensions are massive: M > ratio · mean over the head's dimensions.

        Raises:
            ValueError: a ratio that is not positive.
        """
        if ratio <= 0:
            raise UserError(f"ratio must be positive, got {ratio}")
        return {n: m > ratio * m.mean(dim=-1, keepdim=True) for n, m in self.result().items()}


@mechanism("massive-values-disruption", paper="massive-values", example={"dimensions": 2})
class MassiveValuesDisruption(Patch):
    """Replace each head's most (or least) massive dimensions of q and k by their mean, in prompts."""

    changes = ("project",)
    beyond = (
        "position: what was projected is disrupted as it is multiplied; what is cached stays",
    )
    nothing: ClassVar[dict[str, Any] | None] = {"dimensions": 0}
    whole_prompts = True

    dimensions: int = option(
        "how many of each head; the published program's one", default=1, at_least=0, kw_only=False
    )
    which: Literal["largest", "smallest"] = option(
        "whether those of largest or smallest norm", default="largest"
    )
    heads: Heads = option(
        "query heads; all unless given; of the keys those heads that serve them", default=None
    )

    def position(self, call: Call, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The prompt's own queries and keys, disrupted; a step's stay."""
        tokens = q.shape[2]
        if call.phase == "decode" or not self.dimensions:
            return q, k
        heads = self.where.over_heads(call.layer, q.shape[1], q.device)
        own = k[:, :, -tokens:]
        serving = heads.unflatten(0, (k.shape[1], -1)).any(dim=1)
        own = self._disrupted(own, call.valid, serving)
        return self._disrupted(q, call.valid, heads), torch.cat([k[:, :, :-tokens], own], dim=2)

    def _disrupted(
        self,
        x: Float[Tensor, "batch heads tokens dim"],
        valid: Bool[Tensor, "batch tokens"] | None,
        heads: Bool[Tensor, " heads"],
    ) -> Float[Tensor, "batch heads tokens dim"]:
        there = torch.ones_like(x[:, 0, :, 0], dtype=torch.bool) if valid is None else valid
        shown = there[:, None, :, None].to(x.dtype)
        norms = (x * shown).float().norm(dim=2)
        count = min(self.dimensions, x.shape[-1])
        at = norms.topk(count, dim=-1, largest=self.which == "largest").indices
        hit = torch.zeros_like(norms, dtype=torch.bool).scatter(-1, at, True) & heads[:, None]
        mean = (x * shown).sum(dim=2) / shown.sum(dim=2).clamp(min=1)
        return torch.where(hit[:, :, None], mean[:, :, None], x)
