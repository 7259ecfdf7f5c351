"""The network of TKL: words in context chunk by chunk, their matches by kernels, the best regions.

Equations: `attlas.systems.tkl_local_retrieval`, whose options these are.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, pad, relu

from attlas import ops
from attlas.attention import Attention
from attlas.errors import UserError
from attlas.network import Network
from attlas.options import Configured, option

#: Neighbours of a best window that count with it, and the first place of a document word.
NEIGHBOURS, FIRST_PLACE = (0, -1, 1, -2, 2), 500
#: Words of a query that have a place.
TERMS = 30
STRIDE = 2


class Shape(Configured):
    """The options of the ranker's network."""

    dim: int = option("width of the word vectors", default=300, at_least=4)
    heads: int = option("of the transformer", default=10, at_least=1)
    layers: int = option("of the transformer", default=2, at_least=1)
    ff: int = option("hidden units of its feed-forward layers", default=100, at_least=1)
    chunk: int = option("words of a chunk", default=40, at_least=1)
    overlap: int = option("words on either side of a chunk read along", default=5, at_least=0)
    window: int = option("words of a region", default=30, at_least=1)
    regions: int = option("best regions that count", default=3, at_least=1)
    saturation: Literal["embedding", "log"] = option("by the query's words, or not", default="embedding")
    centres: tuple[float, ...] = option(
        "of the Gaussian kernels", default=(1.0, 0.9, 0.7, 0.5, 0.3, 0.1, -0.1, -0.3, -0.5, -0.7, -0.9)
    )
    widths: tuple[float, ...] = option(
        "of the Gaussian kernels; all 0.1 unless given", above=0,
        factory=lambda shape: (0.1,) * len(shape.centres),
    )  # fmt: skip
    places: bool = option("whether words know where they stand", default=True)

    def check_shape(self) -> None:
        """Refuse what does not go together."""
        if self.dim % self.heads:
            raise UserError(f"heads must divide dim={self.dim}, got {self.heads}")
        if not self.centres or len(self.centres) != len(self.widths):
            raise UserError(
                f"widths takes one for each of the {len(self.centres)} centres (one at least), got "
                f"{len(self.widths)}"
            )


class Block(nn.Module):
    """A layer of the transformer: attention and ReLU units, each added and then normed."""

    def __init__(self, dim: int, heads: int, ff: int) -> None:
        super().__init__()
        self.attention = Attention(dim, heads, causal=False, bias=True)
        self.up, self.down = nn.Linear(dim, ff), nn.Linear(ff, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        own = self.attention
        for projection in (own.q_proj, own.k_proj, own.v_proj):
            nn.init.uniform_(projection.weight, -((1.5 / dim) ** 0.5), (1.5 / dim) ** 0.5)
            nn.init.zeros_(projection.bias)
        nn.init.zeros_(own.o_proj.bias)

    def forward(
        self, x: Float[Tensor, "batch words dim"], mask: Bool[Tensor, "batch words"]
    ) -> Float[Tensor, "batch words dim"]:
        """The layer."""
        x = self.norm1(x + self.attention(x, mask=mask))
        y: Tensor = self.norm2(x + self.down(relu(self.up(x))))
        return y


class LocalRanker(Shape, Network):
    """Scores of documents for queries, from word vectors."""

    def setup(self) -> None:
        """Make the weights."""
        self.check_shape()
        self.hold("mu", lambda: torch.tensor(self.centres))
        self.hold("sigma", lambda: torch.tensor(self.widths))
        self.mu: Tensor
        self.sigma: Tensor
        self.blocks = nn.ModuleList(Block(self.dim, self.heads, self.ff) for _ in range(self.layers))
        self.mixer = nn.Parameter(torch.full((1,), 0.5))
        if self.places:
            self.query_places = nn.Parameter(sinusoids(TERMS, self.dim))
            span = self.chunk + 2 * self.overlap
            self.document_places = nn.Parameter(sinusoids(span, self.dim, FIRST_PLACE))
        if self.saturation == "log":
            self.kernel_scale = nn.Parameter(torch.ones(len(self.centres)))
        else:
            self.salience = nn.Linear(self.dim, 1, bias=False)
            self.norm = nn.LayerNorm(2)
            self.saturate = nn.Linear(2, 3)
            nn.init.uniform_(self.saturate.weight, -0.014, 0.014)
            nn.init.constant_(self.saturate.bias, 100.0)
        self.kernel_weights = nn.Parameter(torch.empty(len(self.centres)).uniform_(-0.014, 0.014))
        self.region_weights = nn.Parameter(torch.ones(len(NEIGHBOURS), self.regions))

    def forward(
        self, query: Float[Tensor, "batch terms dim"], document: Float[Tensor, "batch words dim"],
        query_mask: Bool[Tensor, "batch terms"], document_mask: Bool[Tensor, "batch words"],
    ) -> Float[Tensor, " batch"]:  # fmt: skip
        """How well each document answers its query; masks are True at words.

        Raises:
            ValueError: a query longer than its places.
        """
        if self.places and query.shape[1] > TERMS:
            raise UserError(f"query takes at most {TERMS} words, got {query.shape[1]}")
        query = self.encode(query, query_mask, self.query_places if self.places else None)
        document = self.read(document, document_mask)
        mask = pad(document_mask, (0, document.shape[1] - document_mask.shape[1]))
        return self.combined(*self.windows(query, document, query_mask, mask))

    def encode(
        self, x: Float[Tensor, "batch words dim"], mask: Bool[Tensor, "batch words"],
        places: Float[Tensor, "places dim"] | None,
    ) -> Float[Tensor, "batch words dim"]:  # fmt: skip
        """Words as they are mixed with what their neighbours make of them."""
        y = x if places is None else x + places[: x.shape[1]]
        for block in self.blocks:
            y = block(y, mask)
        return (self.mixer * x + (1 - self.mixer) * y) * mask[..., None]

    def chunks(self, words: int) -> int:
        """How many chunks a document is read in."""
        return max(1, -(-words // self.chunk))

    def read(
        self, document: Float[Tensor, "batch words dim"], mask: Bool[Tensor, "batch words"]
    ) -> Float[Tensor, "batch whole_chunks dim"]:
        """The document's words in context, chunk by chunk; chunks without a word are not read."""
        span, room = self.chunk + 2 * self.overlap, self.chunks(mask.shape[1]) * self.chunk
        sides = (self.overlap, room + self.overlap - mask.shape[1])
        pieces = pad(document, (0, 0, *sides)).unfold(1, span, self.chunk).transpose(2, 3)
        seen = pad(mask, sides).unfold(1, span, self.chunk)
        inner = slice(self.overlap, self.overlap + self.chunk)
        filled = seen[..., inner].any(-1)
        places = self.document_places if self.places else None
        found = self.encode(pieces[filled], seen[filled], places)[:, inner]
        whole = found.new_zeros(*filled.shape, *found.shape[1:]).masked_scatter(
            filled[..., None, None], found
        )
        return whole.flatten(1, 2)

    @ops.exact
    def windows(
        self, query: Float[Tensor, "batch terms dim"], document: Float[Tensor, "batch words dim"],
        query_mask: Bool[Tensor, "batch terms"], mask: Bool[Tensor, "batch words"],
    ) -> tuple[Float[Tensor, "batch windows"], Bool[Tensor, "batch windows"]]:  # fmt: skip
        """(the score of each window, whether it holds a word)."""
        query, document = ops.wide(query), ops.wide(document)
        cosine = ops.unit(query, 1e-13) @ ops.unit(document, 1e-13).mT
        kernels = torch.exp(-(((cosine[..., None] - self.mu) / self.sigma) ** 2) / 2)
        kernels = kernels * mask[:, None, :, None]
        counted = (kernels.sum(-1, keepdim=True) != 0).to(kernels.dtype)
        short = max(0, self.window - mask.shape[1])
        both = pad(torch.cat((kernels, counted), -1), (0, 0, 0, short))  # [batch terms words kernels+1]
        pooled = avg_pool1d(both.mT.flatten(1, 2), self.window, STRIDE) * self.window
        sums = pooled.unflatten(1, both.shape[1::2]).mT  # [batch terms windows kernels+1]
        sums, lengths = sums[..., :-1].clamp(min=1e-10), sums[..., -1:].round()
        if self.saturation == "log":
            saturated = (sums * self.kernel_scale).clamp(min=1e-10).log()
        else:
            salience = self.salience(query)[:, :, None].expand_as(lengths)
            a, b, c = self.saturate(self.norm(torch.cat((salience, lengths), -1))).chunk(3, -1)
            saturated = a * sums ** (1 / b) - c
        saturated = saturated * query_mask[:, :, None, None] * (lengths > 0)
        scores = saturated.sum(1) @ ops.wide(self.kernel_weights)
        return scores, ((lengths > 0) & query_mask[:, :, None, None]).any(1)[..., 0]

    @ops.exact
    def combined(
        self, scores: Float[Tensor, "batch windows"], filled: Bool[Tensor, "batch windows"]
    ) -> Float[Tensor, " batch"]:
        """The best windows that lie apart, each with its neighbours; empty ones count nothing."""
        short = max(0, self.regions - scores.shape[1])
        scores, filled = pad(scores.masked_fill(~filled, 0), (0, short)), pad(filled, (0, short))
        # Below all scores the empty windows, below them those too near, the earlier the higher.
        floor = torch.finfo(scores.dtype).min / 4
        left = scores.detach().masked_fill(~filled, floor)
        number = torch.arange(scores.shape[1], device=scores.device)
        best = []
        for rank in range(self.regions):
            best.append(left.argmax(1))
            near = (number - best[-1][:, None]).abs() < self.window / 2
            left = left.masked_fill(near, floor * (2 + rank / self.regions))
        offsets = torch.tensor(NEIGHBOURS, device=scores.device)[:, None]
        index = (torch.stack(best, -1)[:, None] + offsets).clamp(0, scores.shape[1] - 1).flatten(1)
        return scores.gather(1, index) @ ops.wide(self.region_weights).flatten()


def sinusoids(count: int, dim: int, first: int = 0) -> Float[Tensor, "count dim"]:
    """Sines, then cosines, of places from `first` on, of wavelengths from 2π to 10000 · 2π."""
    half = dim // 2
    angles = torch.arange(first, first + count)[:, None] * torch.exp(
        -math.log(1e4) / (half - 1) * torch.arange(half)
    )
    return pad(torch.cat((angles.sin(), angles.cos()), -1), (0, dim % 2))
