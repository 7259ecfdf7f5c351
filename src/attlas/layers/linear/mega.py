"""Mega: one gated head of attention between tokens that a moving average has told of their past.

    h_t = α ⊙ (β x_t) + (1 − α ⊙ δ) ⊙ h_{t−1}      y_t = η · h_t      x' = SiLU(y + ω ⊙ x)
    z = SiLU(x' W_z)      q, k = γ ⊙ z + μ, with a γ and a μ each      v = SiLU(x W_v)
    weights = f(q kᵀ / τ + b),  f softmax with τ = √z, or relu² or Laplace with τ the keys seen
    h = SiLU(x' W_h + (r ⊙ (weights v)) U)      out = φ ⊙ h + (1 − φ) ⊙ x

Laplace is (1 + erf((s − μ) / (σ√2))) / 2 with μ = √½, σ = √(1/4π): relu² made smooth. The average has
`ema` values h for each channel, with α and δ in (0, 1). φ = sigmoid(x' W_φ) updates, r = SiLU(x' W_r)
resets. b is a number for each distance, or one that rotated vectors give. Without `causal` a second
average runs backwards, and the token itself counts in both.

Cost: the average n log n by FFT, one step at a time while decoding; attention 2·n²·(z + values)
multiply-adds, or with chunks 2·n·chunk·(z + values). Memory linear in n where f is softmax or in chunks.
Reduces to gated single-head attention where the average hands on x.
Source: "Mega: Moving Average Equipped Gated Attention" and its authors' program, which has 1/√ema in η
and x' = SiLU(y + ω ⊙ x). There, distances beyond `max_positions` are refused; here they share the last.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn.functional import silu

from attlas import masks
from attlas.attention import Attention
from attlas.bases.damped_ema import DampedEMA
from attlas.bases.packing import at_places, place, ranks
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.inputs import Inputs
from attlas.options import option
from attlas.positions import ScoreMod
from attlas.positions.base import of_distance, relative
from attlas.supports import Supports


@mechanism("mega", example={"heads": 1})
class Mega(Attention):
    """Gated attention of one head on a moving average."""

    supports = Supports(cross=False, position=False, masks="padding", remembers=True)
    changes = ("position",)  # biases of distances, within score and score_mod
    expected_failures: ClassVar[dict[str, str]] = {
        "static-cache": "its layers have no room for the state of the moving average",
        "told-positions": "the average is over tokens in their order",
    }

    heads: int = option("query heads: one", default=1, at_least=1, kw_only=False)
    head_dim: int = option(
        "z, width of queries and keys; dim / 4 unless given", at_least=1, kw_only=False,
        factory=lambda layer: max(2, layer.dim // 8 * 2),
    )  # fmt: skip
    bias: bool = option("whether the projections have one", default=True)
    values: int = option(
        "width of the values; 2 dim unless given", factory=lambda layer: 2 * layer.dim, at_least=1
    )
    ema: int = option("values that the average keeps for each channel", default=16, at_least=1)
    weights_by: Literal["softmax", "relu2", "laplace"] = option("f", default="softmax")
    relative: Literal["simple", "rotary"] = option(
        "b: a trained number for each distance, or rotated vectors", default="simple"
    )
    max_positions: int = option(
        "distances that have a number of their own", default=1024, at_least=1
    )
    prenorm: bool = option("a LayerNorm of x before everything but the last ⊙ x", default=False)

    def setup(self) -> None:
        """What makes queries and keys of z, and the biases of distances.

        Raises:
            ValueError: more heads than one, or an odd width that cannot be rotated.
        """
        super().setup()
        if self.heads != 1:
            raise UserError(
                f"heads must be 1, got {self.heads}: the reset gate is what more would do"
            )
        rotary, z = self.relative == "rotary", self.head_dim
        if rotary and z % 2:
            raise UserError(f"head_dim must be even for relative='rotary', got {z}")
        self.gain = nn.Parameter(0.02 * torch.randn(2, z))
        self.shift = nn.Parameter(torch.zeros(2, z))
        shape = (2, z) if rotary else (2 * self.max_positions - 1,)
        self.distance = nn.Parameter(0.02 * torch.randn(shape))
        self.scale = 1.0  # queries carry it, since τ may differ from one to the next

    def make_projections(self) -> None:
        """The average, and projections that start small."""
        self.average = DampedEMA(self.dim, self.ema, both_ways=not self.causal)
        self.norm = nn.LayerNorm(self.dim) if self.prenorm else nn.Identity()
        mixed = self.dim + self.head_dim + self.values + self.dim
        self.v_proj = nn.Linear(self.dim, self.values, bias=self.bias)
        self.mixed_proj = nn.Linear(self.dim, mixed, bias=self.bias)
        self.o_proj = nn.Linear(self.values, self.dim, bias=self.bias)
        for projection in (self.v_proj, self.mixed_proj, self.o_proj):
            nn.init.normal_(projection.weight, std=0.02)
            if self.bias:
                nn.init.zeros_(projection.bias)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys of averages, values; gates are noted for the output."""
        if not self.causal and (inputs.cache is not None or inputs.mask == masks.causal):
            which = "mask" if inputs.cache is None else "cache"
            raise UserError(f"{which}: causal=False averages over what comes after a token")
        x = self.norm(inputs.x)
        averaged, state = self.average(x, inputs.valid_now, inputs.recall("average"))
        if state is not None:
            inputs.remember("average", state)
        widths = [self.dim, self.head_dim, self.values, self.dim]
        names = ("update", "z", "reset", "own")
        inputs.notes.update(
            zip(names, self.mixed_proj(averaged).split(widths, dim=-1), strict=True)
        )
        z = silu(inputs.notes["z"])
        q, k = (z * gain + shift for gain, shift in zip(self.gain, self.shift, strict=True))
        if self.weights_by == "softmax":
            q = q * self.head_dim**-0.5
        return q[:, None], k[:, None], silu(self.v_proj(x))[:, None]

    @property
    def score_mod(self) -> ScoreMod | None:
        """Score plus the number of its distance, where there is one."""
        return self._biased if self.relative == "simple" else None

    @of_distance("number")
    def _biased(self, score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + self.number(h, relative(q_idx, kv_idx)).to(score.dtype)

    def number(self, h: Tensor, distance: Tensor) -> Tensor:
        """The trained number of a distance."""
        far = len(self.distance) // 2
        return self.distance[distance.clamp(-far, far) + far]

    def score(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """q kᵀ / τ, and the bias that rotated vectors give."""
        if self.weights_by != "softmax":
            seen = inputs.visible(q, k)
            q = q / (k.shape[2] if seen is None else seen.sum(-1, keepdim=True).clamp(min=1))
        return super().score(q, k, inputs)

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Queries and keys, longer by the rotated vectors whose product is the bias of a distance."""
        if self.relative == "simple":
            return q, k
        of = inputs.positions_of(k.shape[2]) if inputs.told else torch.arange(k.shape[2], device=k.device)
        places = of[..., -q.shape[2] :], of
        first, second = (
            _rotated(x, at).to(k.dtype).reshape(-1, 1, at.shape[-1], len(x)).expand(len(k), -1, -1, -1)
            for x, at in zip(self.distance, places, strict=True)
        )
        return torch.cat((q, first), dim=-1), torch.cat((k, second), dim=-1)

    def normalize(self, scores: Tensor, inputs: Inputs) -> Tensor:
        """f."""
        if self.weights_by == "relu2":
            return scores.relu().square()
        if self.weights_by == "laplace":
            return (1 + torch.erf((scores - 0.5**0.5) * (2 * math.pi) ** 0.5)) / 2
        return super().normalize(scores, inputs)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """One fused call for a softmax, else all pairs."""
        if self.weights_by == "softmax":
            return self.fused(*self.features(q, k, inputs), v, inputs)
        return self.aggregate(Mega.weigh(self, q, k, inputs), v, inputs)

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """What the reset gate lets through, and as much of it as the update gate takes in."""
        update, reset, own = (inputs.notes[name] for name in ("update", "reset", "own"))
        h = silu(own + self.o_proj(heads[:, 0] * silu(reset)))
        y: Tensor = inputs.x + update.sigmoid() * (h - inputs.x)
        return y


def _rotated(
    vector: Float[Tensor, " z"], places: Integer[Tensor, "*batch places"]
) -> Float[Tensor, "*batch places z"]:
    first, second = vector.chunk(2)
    steps = torch.arange(len(first), device=vector.device) / len(first)
    angle = places[..., None] * 10000.0**-steps
    sin, cos = angle.sin(), angle.cos()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@mechanism("mega-chunk", paper="mega", example={"heads": 1, "chunk": 4})
class MegaChunk(Mega):
    """Mega whose tokens attend within chunks; the average alone goes on from one to the next."""

    supports = replace(Mega.supports, cache="state", counts=True)
    expected_failures: ClassVar[dict[str, str]] = {}

    max_positions: int = option(
        "distances that have a number of their own; as many as a chunk unless given",
        factory=lambda layer: layer.chunk, at_least=1,
    )  # fmt: skip
    chunk: int = option("tokens of a chunk", default=128, at_least=1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Chunk by chunk, from the unfinished one in the cache on."""
        names, valid = ("chunk keys", "chunk values"), inputs.valid_now
        if valid is None:
            valid = torch.ones(len(k), k.shape[2], dtype=torch.bool, device=k.device)
        if (filled := inputs.recall("filled")) is None:
            filled = valid.new_zeros(len(k), 1, dtype=torch.long)
        at = ranks(valid)
        at = at.where(at < 0, at + filled)
        slots = -(-(k.shape[2] + (self.chunk - 1 if inputs.cache is not None else 0)) // self.chunk)
        slots, last = slots * self.chunk, filled + valid.sum(-1, keepdim=True)
        placed = [place(q[:, 0], at, q.new_zeros(len(q), slots, q.shape[-1]))]
        begin = last // self.chunk * self.chunk
        left = (begin + torch.arange(self.chunk, device=k.device)).clamp(max=slots - 1)
        for name, x in zip(names, (k, v), strict=True):
            onto = x.new_zeros(len(x), slots, x.shape[-1])
            if (before := inputs.recall(name)) is not None:
                onto = torch.cat((before, onto[:, self.chunk :]), dim=1)
            placed.append(place(x[:, 0], at, onto))
            inputs.remember(name, at_places(placed[-1], left))
        inputs.remember("filled", last - begin)
        q, k, v = (x.unflatten(1, (-1, self.chunk)).flatten(0, 1)[:, None] for x in placed)
        used = (torch.arange(slots, device=k.device) < last).view(-1, self.chunk)
        # Behind the last token nothing is visible to a causal query anyway.
        inside = masks.causal if self.causal else masks.padding(used)
        out = super().attend(q, k, v, replace(inputs, pairs=inside, given=False, mask=None))
        return at_places(out.reshape(len(at), slots, out.shape[-1]), at)[:, None]

    def weigh(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """The weights of all pairs: none between chunks.

        Raises:
            ValueError: a cache, which has let go of the chunks before.
        """
        if inputs.recall("filled") is not None:
            raise ValueError("cache: keys of the chunks before are not known any more")
        valid = inputs.valid_now
        at = torch.arange(k.shape[2], device=k.device)[None] if valid is None else ranks(valid)
        number = at.div(self.chunk, rounding_mode="floor")[:, None]
        same, visible = number[..., :, None] == number[..., None, :], inputs.visible(q, k)
        same = same if visible is None else same & visible
        return super().weigh(q, k, replace(inputs, pairs=same))
