"""Activation patching: what passes a point of the model is replaced, by another run's or a constant.

    x' = given at the chosen layers, heads and tokens, x elsewhere

The points are those of the stream (`residual`, `attention`, `mlp`, `final`), the heads' outputs before
their projection (`heads`), and queries, keys and values as they are multiplied (`q`, `k`, `v`; rotated,
with one head of keys for each group). `activations` records the same points, so that one run's record
patches another. What a cache holds of keys and values stays.

Cost: none to speak of; a pattern is applied to weights, a block of queries at a time.
Reduces to the model alone where what is given is the run's own.

Source: "Locating and Editing Factual Associations in GPT"; "Interpretability in the Wild".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attlas.attach.call import Call, ForwardPass, Site
from attlas.attach.part import Patch
from attlas.attach.stream import OF_CALLS, POINTS
from attlas.attach.where import in_positions
from attlas.catalog.registry import mechanism
from attlas.errors import UnknownName, UserError
from attlas.options import option
from attlas.storage.rows import Rows


class _AtTokens(Patch):
    """A patch of chosen tokens."""

    positions: tuple[int, ...] | None = option(
        "tokens, counted by each row's own valid ones, negative ones from the last; all unless given",
        default=None,
    )

    def tokens(
        self, forward_pass: ForwardPass, batch: int, count: int, device: torch.device
    ) -> Bool[Tensor, "batch count"]:
        """Which of a call's tokens are meant."""
        rows = Rows(forward_pass.valid, forward_pass.offset + count)
        return in_positions(self.positions, rows, count, batch, device)

    def given_at(
        self, given: Tensor, layer: int, forward_pass: ForwardPass, axis: int, x: Tensor, what: str
    ) -> Tensor:
        """A layer's row of what was given, the columns of this call, broadcast to what passes.

        Args:
            given: [layers, #batch, ...], the tokens on axis `axis` of a layer's row.
            layer: which.
            forward_pass: under way.
            axis: of the tokens, in x as in the row.
            x: what passes.
            what: its name.

        Raises:
            ValueError: shapes that do not fit.
        """
        if not 0 <= layer < given.shape[0]:
            raise UserError(f"by[{what!r}] has {given.shape[0]} layers and none for layer {layer}")
        row, count = given[layer].to(x), x.shape[axis]
        if row.ndim == x.ndim and row.shape[axis] not in (1, count):
            first = forward_pass.offset
            row = row.narrow(axis, first, count) if row.shape[axis] >= first + count else row
        try:
            return row.expand(x.shape)
        except RuntimeError:
            raise UserError(
                f"by[{what!r}] is {list(given.shape[1:])} of a layer, what passes is {list(x.shape)}"
            ) from None


@mechanism("replace", paper="", example={"by": {"heads": torch.full((6, 1, 1, 4, 8), 0.5)}})
class Replace(_AtTokens):
    """Replaces what passes at chosen points, layers, heads and tokens."""

    nothing: ClassVar[dict[str, Any] | None] = {"positions": ()}
    changes = ("project", "output")

    by: Mapping[str, Tensor] = option(
        "point -> what takes the place of what passes there, [layers, #batch, #tokens, ...] as "
        "`activations` gives it", kw_only=False,
    )  # fmt: skip

    def setup(self) -> None:
        """Refuse points that are none."""
        super().setup()
        for point in self.by:
            if point not in (*POINTS, *OF_CALLS):
                raise UnknownName("point of by", point, (*POINTS, *OF_CALLS))
        self.points = tuple(point for point in POINTS if point in self.by)

    def check(self, model: nn.Module) -> None:
        """Refuse heads of a point that has none."""
        if self.points and self.where.heads is not None:
            raise UserError(f"heads: {self.points[0]!r} is of a whole layer and has no heads")

    def stream(
        self, site: Site, x: Float[Tensor, "batch query width"]
    ) -> Float[Tensor, "batch query width"] | None:
        """What passes, the chosen tokens replaced."""
        if site.point not in self.by or self.positions == ():
            return None
        layer = 0 if site.point == "final" else site.layer
        given = self.given_at(self.by[site.point], layer, site.forward_pass, 1, x, site.point)
        chosen = self.tokens(site.forward_pass, x.shape[0], x.shape[1], x.device)
        return torch.where(chosen[..., None], given, x)

    def position(self, call: Call, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, the chosen replaced."""
        return self._projected(call, q, "q"), self._projected(call, k, "k")

    def read_values(self, call: Call, v: Tensor) -> Tensor:
        """Values, the chosen replaced."""
        return self._projected(call, v, "v")

    def _projected(self, call: Call, x: Tensor, point: str) -> Tensor:
        """[batch, heads, slots, dim], where the call's own tokens stand last."""
        if point not in self.by or self.positions == ():
            return x
        count = call.q.shape[2]
        own = x[:, :, -count:]
        by_head = self.by[point].transpose(2, 3)
        given = self.given_at(by_head, call.layer, call.forward_pass, 2, own, point)
        heads = self.where.over_heads(call.layer, call.q.shape[1], x.device)
        heads = heads.unflatten(0, (x.shape[1], -1)).any(dim=1)  # of keys, those that serve the chosen
        chosen = self.tokens(call.forward_pass, x.shape[0], count, x.device)
        own = torch.where(heads[:, None, None] & chosen[:, None, :, None], given, own)
        return torch.cat([x[:, :, :-count], own], dim=2)

    def output(
        self, call: Call, heads: Float[Tensor, "batch query heads value_dim"]
    ) -> Float[Tensor, "batch query heads value_dim"]:
        """The heads' outputs, the chosen replaced."""
        if "heads" not in self.by or self.positions == ():
            return heads
        given = self.given_at(self.by["heads"], call.layer, call.forward_pass, 1, heads, "heads")
        which = self.where.over_heads(call.layer, heads.shape[2], heads.device)
        chosen = self.tokens(call.forward_pass, heads.shape[0], heads.shape[1], heads.device)
        return torch.where(chosen[..., None, None] & which[:, None], given, heads)


@mechanism("replace-pattern", paper="", example={"pattern": torch.full((6, 1, 4, 1, 1), 0.01)})
class ReplacePattern(_AtTokens):
    """Replaces the attention weights of chosen layers, heads and queries."""

    nothing: ClassVar[dict[str, Any] | None] = {"positions": ()}

    pattern: Tensor = option(
        "what takes the weights' place, [layers, #batch, heads, #tokens, #keys] as `weights` records it; "
        "later keys stay unseen", kw_only=False,
    )  # fmt: skip

    def normalize(self, call: Call, weights: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """A block of weights, the rows of the chosen heads and queries replaced."""
        if self.positions == ():
            return weights
        if keys.ndim != 1:
            raise UserError("pattern: a cache dropped tokens, and a pattern is of all of them")
        row = self.pattern[call.layer].to(weights)
        if row.shape[2] > 1:
            row = row[:, :, queries]
        if row.shape[3] > 1:
            row = row[..., keys]
        if call.is_causal:
            row = row.masked_fill(keys > queries[:, None], 0.0)
        which = self.where.over_heads(call.layer, weights.shape[1], weights.device)
        tokens = self.tokens(call.forward_pass, weights.shape[0], call.q.shape[2], weights.device)
        chosen = tokens[:, queries - call.forward_pass.offset]
        return torch.where(which[:, None, None] & chosen[:, None, :, None], row, weights)
