"""Attention without a softmax, for functions sampled at n points: sums that stand for integrals.

    Fourier type     z = (LN(q) LN(k)ᵀ / √d) v / n        columns are a learnt Fourier basis
    Galerkin type    z = q (LN(k)ᵀ LN(v)) / n             columns are test functions of a projection
    linear type      z = softmax_d(q) (softmax_n(LN(k))ᵀ LN(v)) / n

Every head has layer norms of its own, unless `norm` is "none". The points' coordinates, where there are
some, stand in front of every head's q, k and v after the norms, and count in d. n is the number of points
that a row sees.
Every output integrates over the whole domain, so there is no causal form.

Cost: n·d² multiply-adds a head, memory linear in n; the Fourier type too, since without a softmax its
product may be taken from the right. Pair-by-pair masks and its dropout need the n² weights.
Reduces to no softmax attention; without norms the first two are linear attention without a divisor.
Source: "Choose a Transformer: Fourier or Galerkin" and its authors' program, which has the coordinates,
the initialisation and the linear type.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from einops import repeat
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.options import option
from attlas.supports import Supports


class _Integral(Attention):
    """What the types share."""

    supports = Supports(causal=False, extras=("coordinates", "context_coordinates"))
    changes = ("aggregate",)
    beyond: ClassVar[tuple[str, ...]] = (
        "project: every head has layer norms, and what a value stands for knows its place",
        "position: coordinates stand in front of queries and keys",
    )
    #: Which of q, k and v have a norm, and whether scores are divided by √d.
    normed: ClassVar[str]
    scaled: ClassVar[bool] = False

    bias: bool = option("whether the projections have one", default=True)
    coordinates: int = option(
        "how many numbers say where a point is; they are then given to `forward`", default=0,
        at_least=0,
    )  # fmt: skip
    norm: Literal["layer", "none"] = option(
        "LN, of every head by itself, or none", default="layer"
    )
    eps: float = option("of the layer norms", default=1e-5)

    def setup(self) -> None:
        """A norm for every head; positions that add to scores are refused."""
        super().setup()
        if self.score_mod is not None:
            raise ValueError("position: a bias on scores means nothing without a softmax")
        self.scale = (self.head_dim + self.coordinates) ** -0.5 if self.scaled else 1.0
        self.with_norm = self.normed if self.norm == "layer" else ""
        for name in self.with_norm:
            shape = (self.heads if name == "q" else self.kv_heads, 1, self.head_dim)
            self.register_parameter(f"{name}_gain", nn.Parameter(torch.ones(shape)))
            self.register_parameter(f"{name}_shift", nn.Parameter(torch.zeros(shape)))

    def make_projections(self) -> None:
        """Projections that start near a hundredth of the identity, and one from wider heads."""
        super().make_projections()
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight, gain=1e-4)
            with torch.no_grad():
                projection.weight += 1e-2 * torch.eye(*projection.weight.shape)
            if self.bias:
                nn.init.zeros_(projection.bias)
        width = self.head_dim + self.coordinates
        self.o_proj = nn.Linear(self.heads * width, self.dim, bias=self.bias)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, normed where the type says so; values know their place."""
        q, k, v = (
            layer_norm(x, x.shape[-1:], eps=self.eps) * getattr(self, f"{name}_gain")
            + getattr(self, f"{name}_shift") if name in self.with_norm else x
            for name, x in zip("qkv", super().project(inputs), strict=True)
        )  # fmt: skip
        return q, k, self._placed(v, inputs, keys=True)

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Coordinates in front of what a position encoding may have rotated."""
        q, k = super().position(q, k, inputs)
        return self._placed(q, inputs, keys=False), self._placed(k, inputs, keys=True)

    def normalize(self, scores: Tensor, inputs: Inputs) -> Tensor:
        """Divided by the number of points that a row sees."""
        seen = scores != -torch.inf
        count = seen.sum(-1, keepdim=True).clamp(min=1).to(scores.dtype)
        return scores.masked_fill(~seen, 0.0) / count

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """The product from the right where all queries see the same points."""
        one_domain = self.pattern is None and (inputs.mask is None or inputs.valid is not None)
        # The Fourier type's dropout falls on its weights, so they must be there.
        if not one_domain or (self.scaled and self.training and self.dropout):
            return self.aggregate(self.weigh(q, k, inputs), v, inputs)
        product = torch.dropout(self.matrix(k, v, inputs), self.dropout, self.training)
        return ops.grouped_product(self.features(q, k, inputs)[0], product * self.scale)

    def matrix(self, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """kᵀ v / n of every key head [batch, kv_heads, d, d]."""
        count = torch.tensor(k.shape[2], device=k.device)
        if inputs.valid is not None:
            valid = inputs.valid[:, None, :, None]
            k, count = k.masked_fill(~valid, 0.0), valid.sum(2, keepdim=True).clamp(min=1)
        return k.transpose(-1, -2) @ (v / count.to(v.dtype))

    def _placed(self, x: Tensor, inputs: Inputs, *, keys: bool) -> Tensor:
        name = "context_coordinates" if keys and inputs.context is not None else "coordinates"
        given, wanted = inputs.extras.get(name), [x.shape[0], x.shape[2], self.coordinates]
        if given is None and not self.coordinates:
            return x
        if given is None or list(given.shape) != wanted:
            got = None if given is None else list(given.shape)
            raise ValueError(f"{name} must be {wanted}, got {got}")
        return torch.cat((repeat(given.to(x.dtype), "b t c -> b h t c", h=x.shape[1]), x), dim=-1)


@mechanism("galerkin-attention", aliases=("galerkin",))
class Galerkin(_Integral):
    """Galerkin-type attention: keys and values are normed."""

    claims = (
        Claim(  # in so few steps neither learns the operator
            "attention without softmax learns solution operators as well or better", task="burgers",
            better="lower", steps=500, batch=16,
        ),
        Claim(
            "trained until the error has fallen, it is no higher than the softmax's", task="burgers",
            ours="galerkin-attention(coordinates=1)", against=("softmax", "galerkin-attention"),
            better="lower", margin=0.0, steps=4000, batch=16, rate=1e-3, exact=True, also="trained",
        ),
    )  # fmt: skip

    normed = "kv"


@mechanism("fourier-attention", paper="galerkin-attention")
class Fourier(_Integral):
    """Fourier-type attention: queries and keys are normed, and their products over √d."""

    normed, scaled = "qk", True


@mechanism("galerkin-linear-attention", paper="galerkin-attention")
class GalerkinLinear(_Integral):
    """Galerkin-type attention whose queries and keys go through a softmax each."""

    beyond = ("score: queries and keys go through a softmax, over channels and over points",)
    normed = "kv"

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Queries that sum to 1 over their channels; keys as they are."""
        return q.softmax(-1), k

    def score(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """Every query's own divisor: the sum over the points that it sees, channel by channel."""
        q, k = q.softmax(-1), ops.repeated(k, q.shape[1])
        visible = inputs.visible(q, k)
        if visible is None:
            return q @ k.softmax(2).transpose(-1, -2)
        shown = visible.any(-2)[..., None]
        top = k.masked_fill(~shown, torch.finfo(k.dtype).min).amax(2, keepdim=True)
        risen = (k - top).masked_fill(~shown, -torch.inf).exp()
        whole = visible.to(q.dtype) @ risen
        return ops.divided(q, whole) @ risen.transpose(-1, -2)

    def matrix(self, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """Keys that sum to 1 over the valid points, times values over n."""
        if inputs.valid is not None:
            k = k.masked_fill(~inputs.valid[:, None, :, None], -torch.inf)
        return super().matrix(ops.softmax(k.transpose(-1, -2)).transpose(-1, -2), v, inputs)
