"""Linear log-normal attention: exponential features as spread out as the weights of softmax attention.

    φ_q(q) = e^{α q}      φ_k(k) = e^{β k}      α σ_q = β σ_k = σ̃ = √((σ_q² σ_k² − b) / 2a)
    lln_ts = φ_q(q_t)·φ_k(k_s) / Σ_r φ_q(q_t)·φ_k(k_r)
    y = ½ (lln V + softmax within blocks of d tokens V)            `mix="average"`
    y = r ⊙ lln V + (1 − r) ⊙ blocks V                              "ratio", r trained for each channel
    y = r ⊙ lln V + p ⊙ blocks V                                    "scale", r and p trained

Weights of softmax attention to Gaussian keys are log-normal, of log-variance σ_q² σ_k²; a sum of
exponentials is nearly so too, of a log-variance a·2σ̃² + b, with a and b fitted once. Moment matching sets
σ̃ so that both agree: as concentrated, at linear cost. Blocks on the diagonal bring sharpness back for
neighbours.

Cost: 4·n·d² multiply-adds a head, memory linear in n; one state of d × d and a block a head in decoding.
Reduces to no registered mechanism.
Source: "Linear Log-Normal Attention with Unbiased Concentration" and its authors' program, which has a
and b. There σ_q and σ_k are deviations over everything at hand, later tokens and other sequences
included. Here that is so while training, and their running means, kept as a BatchNorm keeps its own,
serve afterwards, so that a token's answer rests on nothing behind it; `calibrate` sets them at once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from attlas import ops
from attlas.bases.exponential_keys import ExponentialKeys
from attlas.bases.packing import at_places, place, ranks
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.inputs import Inputs
from attlas.network import moving
from attlas.options import option

#: Of the line that log-variances of sums of exponentials lie on.
A, B = 0.14855178144710912, -0.35487039130661086


@mechanism("linear-log-normal-attention", aliases=("lln-attention",))
class LinearLogNormalAttention(ExponentialKeys):
    """Linear attention matched to softmax's moments, averaged with softmax within blocks."""

    supports = replace(ExponentialKeys.supports, cross=False)
    beyond = ("position: while training, the deviations of queries and keys are measured here",)

    blocks: bool = option("whether the blocks on the diagonal take part", default=True)
    mix: Literal["average", "ratio", "scale"] = option(
        "how they and the rest are added up, see above; ratio and scale have no map of weights",
        default="average",
    )  # fmt: skip
    momentum: float = option(
        "share of a training pass in the running deviations", default=0.1, at_least=0, at_most=1
    )
    eps: float = option("added to the sum that divides", default=1e-5, at_least=0)

    def setup(self) -> None:
        """The running deviations, and the trained shares of both parts.

        Raises:
            UserError: trained shares without blocks, or with dropout.
        """
        super().setup()
        self.q_std: Tensor
        self.k_std: Tensor
        for name in ("q_std", "k_std"):
            self.register_buffer(name, torch.ones(()))
        if self.mix != "average" and (self.dropout or not self.blocks):
            raise UserError(
                f"mix={self.mix!r} adds blocks to the rest, and has no map whose weights could be "
                f"dropped; it takes blocks=True and dropout=0, got {self.blocks} and {self.dropout}"
            )
        for name in {"average": "", "ratio": "r", "scale": "rp"}[self.mix]:
            start = torch.full((self.heads, 1, self.head_dim), 0.5)
            self.register_parameter(f"{name}_share", nn.Parameter(start))

    @moving
    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Queries and keys that know where they stand, by whose deviations the running ones move."""
        q, k = super().position(q, k, inputs)
        if self.training:
            self.calibrate(q, k, inputs.valid_now, self.momentum)
        return q, k

    @torch.no_grad()
    def calibrate(
        self, q: Tensor, k: Tensor, valid: Tensor | None = None, share: float = 1.0
    ) -> None:
        """Move the running deviations to those of these queries and keys, by a share of the way."""
        for buffer, x in ((self.q_std, q), (self.k_std, k)):
            buffer.lerp_(deviation(x, valid).to(buffer.dtype), share)

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """φ of queries over its largest channel, and logarithms of that of keys."""
        sigmas = (deviation(q), deviation(k)) if self.training else (self.q_std, self.k_std)
        alpha, beta = matched(*sigmas)
        q = alpha.to(q.dtype) * q
        return (q - q.amax(-1, keepdim=True)).exp(), beta.to(k.dtype) * k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """The recurrence, and the blocks."""
        out = super().attend(q, k, v, inputs)
        if not self.blocks:
            return out
        blocks = self.diagonal(q, k, v, inputs)
        # Dropout falls on the map, which has both parts in it.
        return out if self.training and self.dropout else self.mixed(out, blocks)

    def mixed(
        self, rest: Float[Tensor, "batch heads tokens width"], blocks: Tensor
    ) -> Float[Tensor, "batch heads tokens width"]:
        """Both parts of the output, added up."""
        if self.mix == "average":
            return (rest + blocks) / 2
        r = self.get_parameter("r_share")
        p = 1 - r if self.mix == "ratio" else self.get_parameter("p_share")
        return r * rest + p * blocks

    def weigh(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries keys"]:
        """The mean of the two maps.

        Raises:
            UserError: shares that differ from channel to channel, so that no map is that of all.
        """
        if self.mix != "average":
            raise UserError(
                f"weights: with mix={self.mix!r} every channel of a head has a map of its own; the "
                "shares of one map are known with mix='average'"
            )
        weights = super().weigh(q, k, inputs)
        if not self.blocks:
            return weights
        tokens = torch.arange(q.shape[2], device=q.device)[None]
        own = (tokens if inputs.valid is None else ranks(inputs.valid)) // self.head_dim
        visible = (own[:, :, None] == own[:, None, :])[:, None]
        pairs = inputs.visible(q, k)
        visible = visible if pairs is None else visible & pairs
        scores = ops.grouped_product(q * self.head_dim**-0.5, k.mT)
        return (weights + ops.softmax(scores.masked_fill(~visible, -torch.inf))) / 2

    def diagonal(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads tokens width"]:
        """Softmax attention within blocks of `head_dim` valid tokens; a cache keeps the last block."""
        (batch, _, tokens, _), size = q.shape, self.head_dim
        valid = inputs.valid_now
        valid = q.new_ones(batch, tokens, dtype=torch.bool) if valid is None else valid
        filled, pairs = inputs.recall("filled"), torch.cat((k, v), dim=-1)
        filled = valid.new_zeros(batch, 1, dtype=torch.long) if filled is None else filled
        at = torch.where(valid, ranks(valid) + filled, -1)
        slots = (tokens // size + 2) * size
        rows = [rearrange(x, "b h t d -> b t (h d)") for x in (q, pairs)]
        room = [x.new_zeros(batch, slots, x.shape[-1]) for x in rows]
        if (before := inputs.recall("block")) is not None:
            room[1][:, :size] = before
        asked, held = (place(x, at, onto) for x, onto in zip(rows, room, strict=True))
        count = filled + valid.sum(-1, keepdim=True)
        if inputs.cache is not None:
            last = count // size * size + torch.arange(size, device=q.device)
            inputs.remember("block", at_places(held, last))
            inputs.remember("filled", count % size)
        queries, keys = (
            rearrange(x, "b (n s) (h d) -> (b n) h s d", s=size, h=heads)
            for x, heads in ((asked, q.shape[1]), (held, k.shape[1]))
        )
        here = torch.arange(slots, device=q.device).expand(batch, -1) < count
        shown = rearrange(here, "b (n s) -> (b n) 1 1 s", s=size).expand(-1, -1, size, -1)
        shown = shown.tril() if inputs.looks_back(self.pattern) else shown
        keys, values = keys.chunk(2, dim=-1)
        out = ops.attend(queries, keys, values, mask=shown, scale=size**-0.5)
        whole = rearrange(out, "(b n) h s d -> b (n s) (h d)", n=slots // size)
        return self.split_heads(at_places(whole, at))


def deviation(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """The unbiased standard deviation of all channels of valid tokens; 1 of fewer than two numbers."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).movedim(1, 2)
    numbers = wide.flatten() if valid is None else wide[valid].flatten()
    found: Tensor = numbers.std() if len(numbers) > 1 else wide.new_ones(())
    return found


def matched(q_std: Tensor, k_std: Tensor) -> tuple[Tensor, Tensor]:
    """α and β of moment matching."""
    least = torch.finfo(q_std.dtype).tiny ** 0.5
    sigma = (((q_std * k_std).square() - B) / (2 * A)).sqrt()
    return sigma / q_std.clamp(min=least), sigma / k_std.clamp(min=least)
