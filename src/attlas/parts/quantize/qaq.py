"""QAQ: bits for every token, from the error that its key or value may have.

    bits   n = ⌈log₂(range / (2 ε) + 1)⌉       clamped to [bits_min, bits_max]
    keys   ε = √(12 / |q| · ln(T³ / (T − 1) · e² + 1))      |q|: norm of a query
    values ε = √(12 / T) · e / a       a: most that one of the last queries attends to the token

e is the error that an output may have, T the tokens seen. A group is a token's numbers in all layers,
in one, or in one head of it. Its ⌈r/2 · n⌉ smallest and as many largest numbers are kept exactly;
range, mean and scale are of the rest:

    uniform   x̂ = code · (max − min) / 2ⁿ + centre     code from −2ⁿ⁻¹ to 2ⁿ⁻¹ − 1
    normal    x̂ = Φ⁻¹(mid-quantile of the bin) · σ + mean      2ⁿ bins that N(0, 1) fills equally

The centre is the middle of the range. The authors' is the mean (`centre="mean"`), from which numbers
may lie farther than codes reach: these are cut off, whatever the bits. Symmetric codes
(`centre="zero"`) take max |x| for half the range. The newest tokens, whose attention cannot be known
yet, stay as they are. Cost: the last queries' attention once for every block of tokens encoded. With
16 bits for all it reduces to full attention, to rounding.

Source: "QAQ: Quality Adaptive Quantization for LLM KV Cache"; the authors' code offers the normal
quantiser with fixed bits alone, and its symmetric mode does not run.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attlas.attach.call import Call
from attlas.cache.asked import remember
from attlas.cache.mixed import attention_paid, spread, taken_columns
from attlas.cache.part import Role
from attlas.cache.quantizer import Quantizer
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.options import option
from attlas.storage.body import Body
from attlas.storage.layer import LayerState, StoredLayer, Taken
from attlas.storage.rows import Rows
from attlas.storage.varied import HOLE, Varied, VariedBody

Grouped = Float[Tensor, "tokens batch groups width"]
PerGroup = Float[Tensor, "tokens batch groups"]


@mechanism(
    "qaq-quality-adaptive-quantization", aliases=("qaq",), example={"block": 8, "q_norm": 4.0}
)
class QAQ(Quantizer):
    """Keep every token in as many bits as the allowed error of outputs asks for."""

    joins: ClassVar[tuple[Role, ...]] = ("evict",)
    comparable: ClassVar[tuple[str, ...]] = ("",)

    key_error: float = option(
        "error e of outputs that keys may cause", default=3.0, above=0, kw_only=False
    )
    value_error: float = option(
        "error e of outputs that values may cause", default=1.0, above=0, kw_only=False
    )
    bits: int | None = option("the same bits for all instead", default=None, at_least=0, at_most=16)
    bits_min: int = option("fewest bits", default=1, at_least=0, at_most=16)
    bits_max: int = option("most bits", default=8, at_least=0, at_most=16)
    outliers: float = option(
        "share r of a group's numbers that is kept exactly", default=0.01, at_least=0, below=1
    )
    level: Literal["token", "layer", "head"] = option(
        "what a group is: a token of all layers, a token of one layer, or of one head",
        default="layer",
    )
    method: Literal["uniform", "normal"] = option(
        "how codes are spaced; normal codes take fixed `bits`", default="uniform"
    )
    centre: Literal["middle", "mean", "zero"] = option(
        "centre of uniform codes: the middle of the range, the mean, or zero", default="middle"
    )
    last: int = option(
        "how many of the last queries tell what attention a token gets", default=5, at_least=1
    )
    q_norm: float = option("norm of a query", default=300.0, above=0)
    block: int = option("tokens that are encoded together", default=64, at_least=1)

    def setup(self) -> None:
        """Refuse normal codes without fixed bits, and bits out of order."""
        super().setup()
        if self.method == "normal" and self.bits is None:
            raise UserError("method='normal' takes fixed bits: there is no rule for its error")
        fixed = self.bits
        self.range = (self.bits_min, self.bits_max) if fixed is None else (fixed, fixed)
        if self.range[0] > self.range[1]:
            raise UserError(
                f"bits_min must be at most bits_max, got {self.bits_min} and {self.bits_max}"
            )
        self.recent = self.last - 1
        self.waiting: list[tuple[StoredLayer, LayerState]] = []

    def learn(self, state: LayerState, call: Call) -> None:
        """Keep the last queries."""
        remember(state, call, lambda rank, count, _: rank >= count - self.last)

    def compress(self, layer: StoredLayer, state: LayerState, rows: Rows) -> None:
        """Find what attention tokens get, and encode all but the newest."""
        counts = [max(0, n - self.recent) // self.block * self.block for n in layer.lengths(rows)]
        if not max(counts, default=0):
            return
        if state.layer == state.full[0]:
            self.waiting.clear()
        self.waiting.append((layer, state))
        if self.level == "token" and state.layer != state.full[-1]:
            return
        waiting, self.waiting = self.waiting, []
        paid = [largest_paid(of, known, rows) for of, known in waiting]
        taken = [of.take(counts, rows) for of, _ in waiting]
        columns = [taken_columns(t).clamp(min=0).long() for t in taken]
        attention = [p.gather(-1, at) for p, at in zip(paid, columns, strict=True)]
        tokens = rows.totals(len(counts), layer.device)
        for (of, _), body in zip(waiting, self._bodies(taken, attention, tokens), strict=True):
            of.put("context", body)

    def _bodies(
        self, taken: list[Taken], attention: list[Tensor], tokens: Int[Tensor, " batch"]
    ) -> list[Body]:
        """The bodies of one layer, or of all where they share bits."""
        hole = (taken_columns(taken[0])[:, 0] < 0).T[..., None]
        most = self._grouped(torch.stack(attention)[..., None]).amax(dim=-1)
        made: dict[str, list[Varied]] = {}
        for name in ("k", "v"):
            parts = torch.stack([getattr(t, name) for t in taken])
            x = self._grouped(parts)
            error = key_error(tokens, self.key_error, self.q_norm)[:, None]
            if name == "v":
                error = value_error(tokens, self.value_error)[:, None] / most
            apart = outlying(x, self.outliers)
            symmetric = self.centre == "zero"
            bits = group_bits(x, apart, error, *self.range, symmetric)
            mean, scale = centred(x, apart, bits, self.method, self.centre)
            mean, scale = mean.to(parts.dtype), scale.to(parts.dtype)
            bits = torch.where(hole, HOLE, bits)
            made[name] = [
                Varied.packed(
                    one, bits, mean, scale, out, heads=parts.shape[2],
                    normal=self.method == "normal",
                )
                for one, out in zip(
                    x.chunk(len(taken), -1), apart.chunk(len(taken), -1), strict=True
                )
            ]  # fmt: skip
        pairs = zip(made["k"], made["v"], taken, strict=True)
        return [VariedBody(k, v, t.index, t.first) for k, v, t in pairs]

    def _grouped(self, x: Float[Tensor, "layers batch heads tokens dim"]) -> Grouped:
        """Numbers by group; those of one layer lie side by side."""
        if self.level == "head":
            return rearrange(x, "1 b h t d -> t b h d")
        return rearrange(x, "l b h t d -> t b 1 (l h d)")


def largest_paid(
    layer: StoredLayer, state: LayerState, rows: Rows
) -> Float[Tensor, "batch kv_heads seen"]:
    """The most that a remembered query attends to each token, by original positions."""
    found = [w.amax(dim=(2, 3)) for w in attention_paid(layer, state, rows)]
    return spread(layer, torch.stack(found).amax(dim=0))


def key_error(
    tokens: Int[Tensor, " batch"], error: float, q_norm: float
) -> Float[Tensor, " batch"]:
    """The error that a key may have."""
    count = tokens.double()
    allowed = (12.0 / q_norm * (count**3 / (count - 1).clamp(min=1) * error**2 + 1).log()).sqrt()
    return allowed.float()


def value_error(tokens: Int[Tensor, " batch"], error: float) -> Float[Tensor, " batch"]:
    """The error that a value may have, times the attention that it gets."""
    return ((12.0 / tokens.double()).sqrt() * error).float()


def outlying(x: Grouped, ratio: float) -> Bool[Tensor, "tokens batch groups width"]:
    """The smallest and the largest numbers of each group, half of the ratio each."""
    if not ratio:
        return torch.zeros_like(x, dtype=torch.bool)
    width = x.shape[-1]
    low = x.float().kthvalue(math.ceil(ratio / 2 * width), dim=-1, keepdim=True).values
    high = math.floor((1 - ratio / 2) * width)
    return (x <= low) | (x > x.float().kthvalue(max(1, high), dim=-1, keepdim=True).values)


def group_bits(
    x: Grouped,
    apart: Bool[Tensor, "tokens batch groups width"],
    error: Float[Tensor, "*#groups"],
    least: int,
    most: int,
    symmetric: bool = False,
) -> Int[Tensor, "tokens batch groups"]:
    """Bits with which the codes of each group are near enough."""
    low, high = _extent(x, apart, symmetric)
    bits = ((high - low) / (2 * error) + 1).log2().ceil()
    return bits.nan_to_num(most).clamp(least, most).long()


def centred(
    x: Grouped,
    apart: Bool[Tensor, "tokens batch groups width"],
    bits: Int[Tensor, "tokens batch groups"],
    method: str,
    centre: str,
) -> tuple[PerGroup, PerGroup]:
    """(centre, scale) of what is not kept apart."""
    count = (~apart).sum(dim=-1)
    mean = x.double().masked_fill(apart, 0.0).sum(dim=-1) / count.clamp(min=1)
    if method == "normal":
        mean = torch.zeros_like(mean) if centre == "zero" else mean
        away = (x.double() - mean[..., None]).masked_fill(apart, 0.0)
        scale = (away.square().sum(dim=-1) / (count - 1).clamp(min=1)).sqrt()
        return mean.float(), scale.float()
    low, high = _extent(x, apart, centre == "zero")
    middle = mean.float() if centre == "mean" else (low + high) / 2
    return middle, (high - low) / 2.0**bits


def _extent(x: Tensor, apart: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """(lowest, highest) of what is not kept apart."""
    x = x.float()
    low = x.masked_fill(apart, torch.inf).amin(dim=-1)
    high = x.masked_fill(apart, -torch.inf).amax(dim=-1)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    return low, high
