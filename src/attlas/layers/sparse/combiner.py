"""Combiner: full attention, of which far tokens are reached through summaries of their regions.

    p(j | i) = softmax_i(j)                       tokens that query i meets directly
    p(j | i) = softmax_i(Ω) · p(j | Ω)            tokens of a region Ω, which i meets as one

One softmax runs over direct tokens and regions: the score of a token is q·k / √d, that of a region
q·k_Ω / √d with k_Ω = pool of its keys. Within it p(j | Ω) = softmax_{j ∈ Ω}(q_Ω·k_j / √d), the same for
all that meet it, with q_Ω = pool of its queries. Text stands in rows of L tokens:

    fixed   direct: the own row; regions: every other row
    log     direct: the own row; regions: the sibling of each node above it in a binary tree of rows
    axial   direct: the own row and column; regions: each other column above the own row, and of each row
            above the parts left and right of the own column, so that those tokens are met twice

Causal regions hold only tokens before the query's row, direct tokens none behind it. In both directions
axial regions are above and below, of the own column too, and left and right of it, in the own row too.
Cost: n·(L + n / L)·d multiply-adds a head for `fixed` and `axial`, n·√n with L = √n, and
n·(L + log(n / L))·d for `log`. Memory as the scores: n·(L + n / L).
Reduces to softmax attention in one row, and `fixed` in rows of one token.
Source: "Combiner: Full Attention Transformer with Sparse Computation Cost" and its authors' program.
Axial regions pool by sums there, and in both directions `fixed` meets the own row as a region as well
(`own_region`). Two oversights of its axial form of both directions are not followed: a token meets
itself in its row and again in its column, and regions without tokens take weight. It has no `log`: that
regions are the nodes of one binary tree is how the paper's spans of powers of two are read here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from attlas import ops
from attlas.attention import Attention
from attlas.bases.packing import place_heads
from attlas.catalog.registry import Reduction, mechanism
from attlas.errors import UserError
from attlas.inputs import Inputs
from attlas.options import option
from attlas.supports import Supports

#: Scores [batch heads rows L met] of what queries meet, its values, and the equation that sums these.
Met = tuple[Tensor, Tensor, str]
#: Equations of values that the queries of a row share, or those of a column.
OF_ROW, OF_COLUMN = "bhrct,bhrtd->bhrcd", "bhrcs,bhscd->bhrcd"


@mechanism(
    "combiner", example={"segment": 3},
    reduces_to=Reduction("softmax", {"segment": 1, "regions": "fixed"}),
)  # fmt: skip
class Combiner(Attention):
    """Attention to all tokens, far ones by summaries."""

    supports = Supports(
        cross=False, masks="padding", memory="quadratic", queries="all", counts=True,
        one_length="rows and levels of regions are counted by the length",
    )  # fmt: skip
    changes = ("mask", "normalize", "aggregate")
    beyond: ClassVar[tuple[str, ...]] = ("position: queries are kept beside keys, for regions to pool",)

    segment: int = option("L, tokens of a row", default=128, at_least=1)
    regions: Literal["fixed", "log", "axial"] = option("what is met as one", default="fixed")
    activation: Literal["identity", "relu"] = option(
        "of queries and keys before they are pooled", default="identity"
    )
    pooling: Literal["max", "mean", "sum"] = option(
        "of a region's queries and keys; sum if axial, else max, unless given",
        factory=lambda layer: "sum" if layer.regions == "axial" else "max",
    )  # fmt: skip
    own_region: bool = option(
        "whether `fixed` of both directions meets the own row as a region too", default=False
    )

    def setup(self) -> None:
        """Refuse what the regions have no form for.

        Raises:
            ValueError: naming the option.
        """
        super().setup()
        if self.position_encoding.score_mod is not None:
            raise ValueError(
                f"position={self.own_position!r} changes the scores of pairs, and a region stands at no "
                "one place; take none, learned, sinusoidal or rope"
            )
        if self.own_region and (self.causal or self.regions != "fixed"):
            raise ValueError("own_region=True is an option of regions='fixed' with causal=False")
        if self.regions == "axial" and (self.activation, self.pooling) != ("identity", "sum"):
            raise ValueError(
                "regions='axial' takes activation='identity' and pooling='sum', got "
                f"{self.activation!r} and {self.pooling!r}"
            )

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """As ever; each key has its token's query beside it."""
        q, k = super().position(q, k, inputs)
        inputs.carry("queries", q)
        return q, k

    def weigh(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries keys"]:
        """What each key's value is summed with: the sum of values that are rows of 1 at one key."""
        one_hot = torch.eye(k.shape[2], dtype=q.dtype, device=q.device)
        return self._combined(q, k, one_hot.expand(len(q), 1, -1, -1), inputs, 0.0)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Direct tokens and summaries, with none of the map."""
        return self._combined(q, k, v, inputs, self.dropout if self.training else 0.0)

    def _combined(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, dropout: float
    ) -> Float[Tensor, "batch heads queries width"]:
        """Attention of this pass's queries, in rows from that of the first of them on.

        Raises:
            ValueError: a cache that has left keys out.
        """
        queries, keys, size = q.shape[2], k.shape[2], self.segment
        if inputs.key_positions.shape[-1] != keys:
            raise UserError(
                f"cache: regions are of all tokens, and {keys} keys are left of "
                f"{inputs.key_positions.shape[-1]}"
            )
        asked = inputs.carried["queries"] * self.scale
        rows = -(-keys // size)
        rows = 1 << (rows - 1).bit_length() if self.regions == "log" else rows
        slots = rows * size
        k, v = (ops.repeated(x, self.heads) for x in (k, v))
        valid = inputs.valid
        if valid is None:
            asked, k, v = (pad(x, (0, 0, 0, slots - keys)) for x in (asked, k, v))
            at = torch.arange(keys, device=q.device)[None]
            shown = torch.arange(slots, device=q.device)[None] < keys
            first = (keys - queries) // size
        else:
            valid = valid[:, -keys:]
            at = (valid.long().cumsum(-1) - 1).masked_fill(~valid, -1)
            asked, k, v = (place_heads(x, at, slots) for x in (asked, k, v))
            shown = torch.arange(slots, device=q.device) < valid.sum(-1, keepdim=True)
            first = 0  # rows of a batch begin at different ones
        asked, k, v = (x.unflatten(2, (rows, size)) for x in (asked, k, v))
        shown = shown.unflatten(1, (rows, size))[:, None]
        direct = self._direct(asked, k, v, shown, first)
        met = {"fixed": self._fixed, "log": self._log, "axial": self._axial}[self.regions]
        parts = [direct, *met(asked, k, v, shown, first)]
        weights = torch.dropout(
            ops.softmax(torch.cat([scores for scores, *_ in parts], dim=-1)), dropout, dropout > 0
        )
        shares = weights.split([scores.shape[-1] for scores, *_ in parts], dim=-1)
        sums = [
            torch.einsum(equation, share, values)
            for share, (_, values, equation) in zip(shares, parts, strict=True)
        ]
        out = torch.stack(sums).sum(0).flatten(2, 3)
        mine = (at[:, -queries:] - first * size).clamp(min=0)[:, None, :, None]
        return out.gather(2, mine.expand(*out.shape[:2], -1, out.shape[-1]))

    def _direct(self, q: Tensor, k: Tensor, v: Tensor, shown: Tensor, first: int) -> Met:
        """Tokens of the own row."""
        scores = q[:, :, first:] @ k[:, :, first:].mT
        column = torch.arange(self.segment, device=q.device)
        seen = (column <= column[:, None]) if self.causal else shown[:, :, first:, None, :]
        return scores.masked_fill(~seen, -torch.inf), v[:, :, first:], OF_ROW

    def _fixed(
        self, q: Tensor, k: Tensor, v: Tensor, shown: Tensor, first: int
    ) -> Iterator[Met]:
        """Every other row, or every earlier one."""
        keys, values = self._summaries(q, k, v, shown)
        scores = torch.einsum("bhrcd,bhsd->bhrcs", q[:, :, first:], keys)
        row = torch.arange(q.shape[2], device=q.device)
        mine = row[first:, None]
        seen = row < mine if self.causal else (row != mine) | self.own_region
        met = seen[:, None] & shown.any(-1)[:, :, None, None]
        yield scores.masked_fill(~met, -torch.inf), values, "bhrcs,bhsd->bhrcd"

    def _log(self, q: Tensor, k: Tensor, v: Tensor, shown: Tensor, first: int) -> Iterator[Met]:
        """At each level of a binary tree the sibling of the node that holds the row."""
        row = torch.arange(first, q.shape[2], device=q.device)
        asks = q[:, :, first:]
        for level in range((q.shape[2] - 1).bit_length()):
            node = row >> level
            keys, values = (
                x[:, :, node ^ 1] for x in self._summaries(*(_joined(x, level) for x in (q, k, v, shown)))
            )
            here = _joined(shown, level).any(-1)[:, :, node ^ 1]
            met = here & (node % 2 == 1) if self.causal else here
            scores = (asks @ keys[..., None]).masked_fill(~met[..., None, None], -torch.inf)
            yield scores, values[:, :, :, None], OF_ROW

    def _axial(self, q: Tensor, k: Tensor, v: Tensor, shown: Tensor, first: int) -> Iterator[Met]:
        """The own column, then columns above and below the row, then rows left and right."""
        asks, causal = q[:, :, first:], self.causal
        row, column = (torch.arange(n, device=q.device) for n in q.shape[2:4])
        mine = row[first:, None]
        others = (row < mine if causal else row != mine)[:, None]
        scores = torch.einsum("bhrcd,bhscd->bhrcs", asks, k)
        there = shown.transpose(2, 3)[:, :, None]  # [batch 1 1 columns rows]
        yield scores.masked_fill(~(others & there), -torch.inf), v, OF_COLUMN
        grid = (q, k, v, shown)
        upright = tuple(x.transpose(2, 3) for x in grid)
        for region in _sides(upright, both=not causal):
            keys, values, some = (x.transpose(2, 3)[:, :, first:] for x in region)
            met = some[:, :, :, None] & ((column != column[:, None]) | (not causal))
            yield (asks @ keys.mT).masked_fill(~met, -torch.inf), values, OF_ROW
        for keys, values, some in _sides(grid, both=True):
            scores = torch.einsum("bhrcd,bhscd->bhrcs", asks, keys)
            met = some.transpose(2, 3)[:, :, None] & (others | (not causal))
            yield scores.masked_fill(~met, -torch.inf), values, OF_COLUMN

    def _summaries(
        self, q: Float[Tensor, "batch heads regions size width"],
        k: Float[Tensor, "batch heads regions size width"],
        v: Float[Tensor, "batch heads regions size values"], shown: Bool[Tensor, "#batch 1 regions size"],
    ) -> tuple[Float[Tensor, "batch heads regions width"], Float[Tensor, "batch heads regions values"]]:
        """A key and a value of each region."""
        scores = torch.einsum("bhsd,bhstd->bhst", self._pooled(q, shown), k)
        local = ops.softmax(scores.masked_fill(~shown, -torch.inf))
        return self._pooled(k, shown), torch.einsum("bhst,bhstd->bhsd", local, v)

    def _pooled(self, x: Tensor, shown: Tensor) -> Tensor:
        x = x.relu() if self.activation == "relu" else x
        if self.pooling == "max":
            most = x.masked_fill(~shown[..., None], -torch.inf).amax(-2)
            return most.masked_fill(~shown.any(-1)[..., None], 0.0)
        total = x.masked_fill(~shown[..., None], 0.0).sum(-2)
        if self.pooling == "sum":
            return total
        return total / shown.sum(-1).clamp(min=1)[..., None]


def _joined(x: Tensor, level: int) -> Tensor:
    """2^level rows as one."""
    parts: Tensor = x.unflatten(2, (-1, 1 << level)).flatten(3, 4)
    return parts


def _sides(grid: tuple[Tensor, ...], both: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of the regions before each token along the fourth axis: keys, values, and whether they hold any
    token; then the same of those behind it.

    Args:
        grid: queries, keys and values [batch heads lines tokens width], and True at tokens.
        both: whether the regions behind are asked for.
    """
    yield _before(*grid)
    if both:
        keys, values, some = _before(*(x.flip(3) for x in grid))
        yield keys.flip(3), values.flip(3), some.flip(3)


def _before(q: Tensor, k: Tensor, v: Tensor, shown: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    number = torch.arange(q.shape[3], device=q.device)
    seen = (number <= number[:, None]) & shown[:, :, :, None]
    values = ops.softmax((q.cumsum(3) @ k.mT).masked_fill(~seen, -torch.inf)) @ v
    some = pad(shown.long().cumsum(3)[:, :, :, :-1], (1, 0)) > 0
    shifted = (pad(x[:, :, :, :-1], (0, 0, 1, 0)) for x in (k.cumsum(3), values))
    return next(shifted), next(shifted), some
