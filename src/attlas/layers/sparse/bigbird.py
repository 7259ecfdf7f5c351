"""BigBird: every block of tokens sees global ones, its neighbours, and a few drawn at random.

    i, j = blocks of query and key (of `block` tokens)
    visible = |i − j| ≤ w // 2   or   j global   or   i global   or   j drawn for (head, i)
    out     = softmax(q kᵀ / √d over visible pairs) · v

Internal form: the first and the last block of the text are global. External form: the first `extra`
tokens are, which the model puts before the text; blocks are cut behind them. Blocks are counted by each
row's valid tokens; what is drawn hangs on the seed, the layer's number and the blocks that a row has.

Cost: (w + 2 + r) · block keys a query (w · block + extra in the external form, and r · block), O(n); the
global queries add 2 · block · n.
Reduces to full attention where window or drawn blocks cover the text.
Source: "Big Bird: Transformers for Longer Sequences".
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from attlas import masks, ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.masks import Mask
from attlas.masks.algebra import Shifted
from attlas.masks.bigbird import block_table
from attlas.options import option
from attlas.supports import Supports
from attlas.tracing import stretches, traced

#: Blocks of queries whose lists are made at once.
ROWS = 64


@mechanism(
    "bigbird", reduces_to=Reduction("softmax", {"window": 65}),
    example={"block": 4, "window": 1, "random": 1},
)  # fmt: skip
class BigBird(Attention):
    """Attention of every token to global, near and random ones."""

    supports: ClassVar[Supports] = Supports(
        causal=False, cross=False, masks="padding", counts=True,
        one_length="the blocks that are there hang on the length",
    )  # fmt: skip

    block: int = option("tokens of a block", default=64, at_least=1)
    window: int = option("blocks of the local window, odd", default=3, at_least=1)
    random: int = option("blocks that are drawn for a block of queries", default=3, at_least=0)
    form: Literal["internal", "external"] = option("which tokens are global", default="internal")
    extra: int = option(
        "first tokens that are global in the external form", at_least=0,
        factory=lambda layer: 0 if layer.form == "internal" else 256,
    )  # fmt: skip
    seed: int = option("of the random blocks", default=0, at_least=0)

    def setup(self) -> None:
        """Refuse even windows, and extra tokens of the internal form."""
        super().setup()
        if self.window % 2 == 0:
            raise ValueError(f"window must be odd, got {self.window}")
        if (self.form == "external") != (self.extra > 0):
            raise ValueError(
                f"extra is of form='external', which has at least 1; got {self.extra} with "
                f"form={self.form!r}"
            )

    def table(
        self, counts: Int[Tensor, " rows"], columns: int, some: slice = slice(None)
    ) -> Bool[Tensor, "rows heads q_blocks columns"]:
        """Which blocks of keys some blocks of queries see, in rows that have so many blocks."""
        return block_table(
            counts, columns, heads=self.heads, window=self.window, random=self.random,
            seed=self.seed + self.layer_idx, ends=self.form == "internal", some=some,
        )  # fmt: skip

    def lists(self, columns: int, device: torch.device) -> Int[Tensor, "1 heads columns count"]:
        """The blocks that those of a row of `columns` blocks see; of global ones too few."""
        counts, width = torch.tensor([columns], device=device), self.window + self.random + 2
        return torch.cat([
            pad(found, (0, width - found.shape[-1]), value=-1)
            for some in stretches(columns, ROWS)
            for found in [ops.as_lists(self.table(counts, columns, some))[..., :width]]
        ], dim=2)  # fmt: skip

    def mask(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> Mask | Bool[Tensor, "b h queries keys"] | None:
        """The pairs of the pattern; as booleans where rows are cut differently."""
        base, extra, size = super().mask(q, k, inputs), self.extra, self.block
        columns = -(-(k.shape[2] - extra) // size)
        if inputs.valid is not None or traced() or columns < 1 or isinstance(base, Tensor):
            return self._pairs(base, inputs, q, k)
        inputs.notes["lists"] = self.lists(columns, k.device)
        listed: Mask = masks.Pages(inputs.notes["lists"], (size, size))
        if extra:
            seen = _behind(listed, extra) | masks.sinks(extra) | masks.sinks(extra).T
        else:
            last = (~masks.sinks((columns - 1) * size)).T if columns > 1 else masks.full
            seen = listed | masks.sinks(size).T | last
        return seen if base is None else seen & base

    def _pairs(
        self, base: Mask | Tensor | None, inputs: Inputs, q: Tensor, k: Tensor
    ) -> Bool[Tensor, "b heads queries keys"]:
        """The pairs, of rows that may have different numbers of blocks."""
        tokens, valid = k.shape[2], inputs.valid
        valid = torch.ones(1, tokens, dtype=torch.bool, device=k.device) if valid is None else valid
        rank = valid.cumsum(-1) - 1 - self.extra
        columns = max(1, -(-(tokens - self.extra) // self.block))
        at = torch.div(rank, self.block, rounding_mode="floor")
        table = self.table((at[:, -1] + 1).clamp(min=0), columns)
        at = at.clamp(0, columns - 1)
        row = torch.arange(len(at), device=k.device)[:, None, None, None]
        head = torch.arange(self.heads, device=k.device)[:, None, None]
        pairs = table[row, head, at[:, None, :, None], at[:, None, None, :]]
        outer = (rank < 0)[:, None]
        pairs = (pairs | outer[..., None] | outer[..., None, :]) & valid[:, None, None, :]
        within = ops.as_dense(base, tokens, tokens, 0, k.device)
        return pairs if within is None else pairs & within

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Listed blocks, and the global queries apart, where the pattern alone hides pairs."""
        listed = inputs.notes.get("lists")
        dropped = self.training and self.dropout > 0
        if listed is None or self.own_mask or self.score_mod or dropped or inputs.mask is not None:
            return super().attend(q, k, v, inputs)
        extra, size = self.extra, self.block
        out, lse = ops.block_sparse(
            q[:, :, extra:], k[:, :, extra:], v[:, :, extra:], listed, size=size, scale=self.scale,
            return_lse=True,
        )  # fmt: skip
        if extra:
            outer = ops.attend(
                q[:, :, extra:], k[:, :, :extra], v[:, :, :extra], scale=self.scale, return_lse=True
            )
            out = ops.merge([(out, lse), outer])[0]
            ends = [slice(0, extra)]
        else:
            first, last = min(size, q.shape[2]), (listed.shape[2] - 1) * size
            out, ends = out[:, :, first:last], [slice(0, first), slice(max(first, last), None)]
        heads = [ops.attend(q[:, :, rows], k, v, scale=self.scale) for rows in ends]
        return torch.cat([heads[0], out, *heads[1:]], dim=2)


def _behind(mask: Mask, by: int) -> Mask:
    """A pattern whose first token stands at position `by`."""
    moved: Mask = Shifted(Shifted(mask, -by).T, -by).T
    return moved
