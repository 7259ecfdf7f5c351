"""A decoder whose queries are learned, one an area, and what it is compared with: routing by content.

See `attlas.systems.transformer_brain_encoder`, whose network this is.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import relu

from attlas.errors import UserError
from attlas.network import Network
from attlas.options import Configured, option


class Routing(nn.Module):
    """Multi-head attention that also tells its map."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.v_proj, self.o_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(
        self, x: Float[Tensor, "batch areas dim"], keys: Float[Tensor, "#batch patches dim"],
        values: Float[Tensor, "batch patches dim"],
    ) -> tuple[Float[Tensor, "batch areas dim"], Float[Tensor, "batch areas patches"]]:  # fmt: skip
        """(what is routed to each area, from where)."""
        q, k, v = (
            projection(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, y in ((self.q_proj, x), (self.k_proj, keys), (self.v_proj, values))
        )
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1).expand(len(values), -1, -1, -1)
        routed: Tensor = self.o_proj((weights @ v).transpose(1, 2).flatten(2))
        return routed, weights.mean(1)


class Layer(nn.Module):
    """A layer: attention to the patches, then ReLU units; normed before it and after each.

    Areas do not see each other: the published program has weights for that and no longer uses them.
    """

    def __init__(self, dim: int, heads: int, ff: int, dropout: float) -> None:
        super().__init__()
        self.routing = Routing(dim, heads)
        self.up, self.down = nn.Linear(dim, ff), nn.Linear(ff, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        for linear in (self.up, self.down):
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self, t: Tensor, queries: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(the areas' tokens, the map)."""
        t = self.norm1(t)
        routed, found = self.routing(t + queries, keys, values)
        t = self.norm2(t + self.dropout(routed))
        return self.norm3(t + self.dropout(self.down(self.dropout(relu(self.up(t)))))), found


class BrainEncoder(Configured, Network):
    """From the features of patches to responses."""

    dim: int = option("width of the features", default=768, at_least=1)
    heads: int = option("of the attention", default=1, at_least=1)
    ff: int = option("ReLU units", default=1024, at_least=1)
    layers: int = option("of the decoder", default=1, at_least=1)
    areas: int = option("queries, as many for each hemisphere", default=16, at_least=1)
    units: tuple[int, ...] = option("units of each hemisphere", default=(1, 1), at_least=1)
    dropout: float = option("in training", default=0.1, at_least=0, below=1)
    keys: Literal["both", "places"] = option("features with places, or places alone", default="both")
    body: Literal["whole", "linear"] = option("the layer, or its routing alone", default="whole")

    def setup(self) -> None:
        """Make the weights."""
        if self.dim % self.heads:
            raise UserError(f"heads must divide dim={self.dim}, got {self.heads}")
        if not self.units or self.areas % len(self.units):
            raise UserError(f"areas must be as many for each of units={self.units}, got {self.areas}")
        self.queries = nn.Parameter(torch.randn(self.areas, self.dim))
        if self.body == "whole":
            sizes = (self.dim, self.heads, self.ff, self.dropout)
            self.decoder = nn.ModuleList(Layer(*sizes) for _ in range(self.layers))
            self.norm = nn.LayerNorm(self.dim)
        else:
            self.routing = Routing(self.dim, self.heads)
        self.readout = nn.ModuleList(nn.Linear(self.dim, count) for count in self.units)

    def tokens(
        self, features: Float[Tensor, "batch dim height width"],
        places: Float[Tensor, "#batch dim height width"],
    ) -> tuple[Float[Tensor, "batch areas dim"], Float[Tensor, "batch areas patches"]]:  # fmt: skip
        """(the token of each area, the last layer's map)."""
        x, at = features.flatten(2).mT, places.flatten(2).mT
        keys = at if self.keys == "places" else x + at
        queries = self.queries.expand(len(x), -1, -1)
        if self.body == "linear":
            routed: tuple[Tensor, Tensor] = self.routing(queries, keys, x)
            return routed
        t, found = torch.zeros_like(queries), x
        for layer in self.decoder:
            t, found = layer(t, queries, keys, x)
        return self.norm(t), found

    def forward(self, features: Tensor, places: Tensor) -> list[Float[Tensor, "batch units areas"]]:
        """What each area of a hemisphere says of all its units; a unit's own area is what counts."""
        tokens = self.tokens(features, places)[0].chunk(len(self.units), dim=1)
        return [read(some).mT for read, some in zip(self.readout, tokens, strict=True)]


class SpatialFeature(nn.Module):
    """The baseline: a fixed map of each area, and feature weights of each unit."""

    def __init__(self, dim: int, areas: int, patches: int, units: int) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.full((areas, patches), 1 / patches))
        self.readout = nn.Linear(dim, units)

    def forward(
        self, features: Float[Tensor, "batch dim height width"]
    ) -> Float[Tensor, "batch units areas"]:
        """As a hemisphere's of `BrainEncoder`."""
        said: Tensor = self.readout(self.map @ features.flatten(2).mT)
        return said.mT


def sines(dim: int, height: int, width: int) -> Float[Tensor, "1 dim height width"]:
    """Sine places of two axes, half of the channels each, rows first; axes scaled to 2π."""
    half = (dim + 1) // 2
    period = 10000 ** (2 * (torch.arange(half) // 2) / half)
    found = []
    for count in (height, width):
        angles = (torch.arange(1, count + 1) / (count + 1e-6) * 2 * math.pi)[:, None] / period
        odd = torch.arange(half) % 2 == 1
        found.append(torch.where(odd, angles.cos(), angles.sin()))
    rows = found[0].T[:, :, None].expand(-1, -1, width)
    columns = found[1].T[:, None].expand(-1, height, -1)
    return torch.cat([rows, columns])[None, :dim]
