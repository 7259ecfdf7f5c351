"""LayerNorm taken apart: a projection that lets a query see all keys equally, a scaling that hides none.

    project(x) = x − mean(x) 1                    orthogonal to the vector of ones
    scale(x)   = √d · x / |x|                     all keys on one sphere
    LayerNorm(x) = gain · scale(project(x)) + bias

A query parallel to 1 gives every projected key the score 0, so that attention is uniform. A key inside
the convex hull of the others never has the highest score, whatever the query; on a sphere no key lies
inside. The majority task asks for the token that most of a sequence is made of: uniform attention
solves it. Its model is one pre-norm block with tied embeddings and no positions.

The published code compares projection at norm √d with its absence at norm 1/√d. This study has that
baseline and one of the same norm √d beside it, which tells projection from scale.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from attlas.catalog.registry import mechanism
from attlas.kinds.study import Beats, Row, Study, Within
from attlas.options import option

#: Accuracy at which the majority task counts as learned, and steps between two looks at it.
LEARNED, LOG_EVERY = 0.99, 10
#: Where rounding ends: |λ| of a convex combination that misses its point by more is none.
TOUCHES = 1e-9

WITH, SAME, PUBLISHED = "with projection", "without, norm √d", "without, norm 1/√d"


class FactorizedLayerNorm(nn.Module):
    """LayerNorm's two parts, each switchable; no epsilon, as published.

    Args:
        dim: width.
        projection: subtract the mean.
        scaling: bring to norm √dim.
        affine: gain and bias behind.
    """

    def __init__(
        self, dim: int, *, projection: bool = True, scaling: bool = True, affine: bool = False
    ) -> None:
        super().__init__()
        self.projection, self.scaling = projection, scaling
        self.gain = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        """The parts that are on, one after the other."""
        if self.projection:
            x = x - x.mean(-1, keepdim=True)
        if self.scaling:
            x = F.normalize(x, dim=-1, eps=1e-12) * x.shape[-1] ** 0.5
        return x if self.gain is None or self.bias is None else self.gain * x + self.bias


def unselectable(keys: Float[Tensor, "keys dim"]) -> list[bool]:
    """For each key, whether no query gives it alone the highest score.

    Linear programming, exact: key i is unselectable if and only if some λ ≥ 0 with Σ λ = 1 has
    Σ λ_j (k_j − k_i) = 0. The best λ is found by Lawson and Hanson's active sets, which end after
    finitely many steps; what it misses by is, where it misses, a query that selects the key.
    """
    found = []
    for i in range(len(keys)):
        # Differences of one length lie in the same hull of directions, and round alike.
        others = F.normalize(
            torch.cat((keys[:i], keys[i + 1 :])).double() - keys[i].double(), dim=-1
        )
        system = torch.cat((others.T, torch.ones(1, len(others), dtype=torch.float64)))
        target = torch.zeros(len(system), dtype=torch.float64)
        target[-1] = 1.0
        missed = target - system @ _non_negative(system, target)
        found.append(float(missed.norm()) < TOUCHES)
    return found


def _non_negative(a: Tensor, b: Tensor) -> Tensor:
    """argmin |a x − b| over x ≥ 0."""
    x, active = torch.zeros(a.shape[1], dtype=a.dtype), torch.zeros(a.shape[1], dtype=torch.bool)
    while True:
        slope = a.T @ (b - a @ x)
        slope[active] = -torch.inf
        best = int(slope.argmax())
        if active.all() or slope[best] <= 1e-12:
            return x
        active[best] = True
        while True:
            free = torch.zeros_like(x)
            free[active] = torch.linalg.lstsq(a[:, active], b[:, None], driver="gelsd").solution[
                :, 0
            ]
            below = active & (free <= 0)
            if not below.any():
                x = free
                break
            if below[best]:  # rounding: the direction does not lead down after all
                return x
            # As far towards the free solution as all stay positive; who reaches 0 leaves.
            step = (x[below] / (x[below] - free[below])).min()
            x = torch.where(active, x + step * (free - x), 0.0).clamp(min=0)
            active &= x > 1e-15


class Majority(nn.Module):
    """One pre-norm transformer block with tied embeddings; `norm` stands before its attention."""

    def __init__(self, classes: int, dim: int, norm: nn.Module) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(classes, dim), norm
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        for layer in (self.q, self.k, self.v):
            nn.init.xavier_uniform_(layer.weight)
        self.o = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)
        )

    def forward(self, tokens: Int[Tensor, "rows length"]) -> Float[Tensor, "rows length classes"]:
        """Logits of the majority, asked for at every position."""
        x = self.embedding(tokens)
        inner = self.norm(x)
        x = x + self.o(F.scaled_dot_product_attention(self.q(inner), self.k(inner), self.v(inner)))
        logits: Tensor = (x + self.mlp(x)) @ self.embedding.weight.T
        return logits


class _Shrunk(nn.Module):
    """The published code's norm without projection: 1/√d instead of √d."""

    def forward(self, x: Tensor) -> Tensor:
        unit: Tensor = F.normalize(x, dim=-1, eps=1e-12)
        return unit / float(x.shape[-1] ** 0.5)


@mechanism("layernorm-expressivity", example={
    "dims": (2, 3), "keys": 8, "sets": 1, "classes": 4, "length": 8, "margin": 2, "dim": 4, "batch": 8,
    "limit": 20,
})  # fmt: skip
class LayerNormExpressivity(Study):
    """Both parts of LayerNorm, measured."""

    claim = (
        "LayerNorm's projection lets attention see all keys equally, so that the majority task trains "
        "faster; its scaling makes every key selectable"
    )

    axis = "width of the keys"

    seeds: int = option("how many seeds decide: 0, 1 and so on", default=5, at_least=1)
    dims: tuple[int, ...] = option(
        "widths of the random keys, for the share that no query can select", default=(2, 3, 4, 6, 8),
        at_least=1,
    )  # fmt: skip
    keys: int = option("keys of a set", default=32, at_least=1)
    sets: int = option("sets drawn of each width", default=4, at_least=1)
    classes: int = option("tokens of the majority task", default=20, at_least=2)
    length: int = option("of the majority task's sequences", default=50, at_least=1)
    margin: int = option("by how many the majority is ahead", default=6, at_least=1)
    dim: int = option("width of the majority task's model", default=32, at_least=1)
    batch: int = option("sequences of a step", default=128, at_least=1)
    rate: float = option("of Adam", default=3e-3, above=0)
    limit: int = option(
        "steps after which a model that has not learned it is given up; it counts as this many",
        default=2000, at_least=1,
    )  # fmt: skip

    def setup(self) -> None:
        """Refuse no widths, and a majority that no sequence can have."""
        super().setup()
        if not self.dims:
            raise ValueError("dims takes one or more widths, got ()")
        if self.margin > self.length // 2:
            raise ValueError(
                f"margin takes at most half of length = {self.length}, got {self.margin}"
            )

    @property
    def set_up(self) -> str:
        """Sizes of the sets and of the model."""
        return (
            f"{self.keys} random keys; one block of width {self.dim}, {self.classes} tokens, sequences "
            f"of {self.length}: steps to {LEARNED:.0%} of the majority task, at most {self.limit}"
        )

    @property
    def expects(self) -> tuple[Beats | Within, ...]:
        """Faster with projection than without, at the published norm and at its own; exact parts."""
        return (
            Beats(WITH, PUBLISHED),
            Beats(WITH, SAME),
            Within("both parts − LayerNorm", most=1e-6),
            Within("uniform attention, error", most=1e-12),
            *(Within(f"unselectable keys at {d}", least=1 / self.keys) for d in self.dims[:1]),
            *(Within(f"unselectable scaled keys at {d}", most=0.0) for d in self.dims),
        )

    def run(self, seed: int) -> Iterator[Row]:
        """Steps to learn the task, the shares of unselectable keys, and how exact the parts are."""
        norms = {WITH: FactorizedLayerNorm(self.dim), PUBLISHED: _Shrunk(),
                 SAME: FactorizedLayerNorm(self.dim, projection=False)}  # fmt: skip
        for name, norm in norms.items():
            yield Row(name, self.steps(norm, seed), "steps", "lower")
        parts = FactorizedLayerNorm
        draw = Generator().manual_seed(seed)
        for dim in self.dims:
            sets = torch.randn(self.sets, self.keys, dim, generator=draw, dtype=torch.float64)
            scaled = parts(dim, projection=False)(sets)
            for name, which in (("unselectable keys", sets), ("unselectable scaled keys", scaled)):
                hidden = [key for one in which for key in unselectable(one)]
                yield Row(name, 100 * sum(hidden) / len(hidden), "%", "lower", at=float(dim))
        x = torch.randn(self.keys, self.dim, generator=draw, dtype=torch.float64)
        gap = parts(self.dim)(x) - F.layer_norm(x, (self.dim,), eps=0.0)
        yield Row("both parts − LayerNorm", float(gap.abs().max()), "", "lower")
        query = torch.randn(1, generator=draw, dtype=torch.float64) * torch.ones(self.dim).double()
        for name, keys in (("uniform attention, error", parts(self.dim, scaling=False)(x)),
                           ("its error without projection", x)):  # fmt: skip
            weights = (query @ keys.T / self.dim**0.5).softmax(-1)
            yield Row(name, float((weights - 1 / self.keys).abs().max()), "", "lower")

    def steps(self, norm: nn.Module, seed: int) -> int:
        """Steps of Adam until the majority task is learned; all models of a seed see the same data."""
        torch.manual_seed(seed)
        model = Majority(self.classes, self.dim, norm).to(self.device)
        adam = torch.optim.Adam(model.parameters(), lr=self.rate)
        draw = Generator().manual_seed(seed)
        tokens, answers = self.sequences(draw, 256)
        for step in range(1, self.limit + 1):
            shown, majority = self.sequences(draw, self.batch)
            wanted = majority[:, None].expand_as(shown).flatten()
            F.cross_entropy(model(shown).flatten(0, 1), wanted).backward()
            adam.step()
            adam.zero_grad()
            if step % LOG_EVERY == 0:
                with torch.no_grad():
                    right = model(tokens).argmax(-1) == answers[:, None]
                if float(right.double().mean()) >= LEARNED:
                    return step
        return self.limit

    def sequences(self, draw: Generator, rows: int) -> tuple[Tensor, Tensor]:
        """Sequences in random order and their majorities, each ahead by `margin` or more."""
        found: list[Tensor] = []
        while sum(map(len, found)) < rows:
            tokens = torch.randint(0, self.classes, (2 * rows, self.length), generator=draw)
            more = torch.randint(0, self.classes, (2 * rows, 1), generator=draw)
            share = 0.4 * torch.rand(2 * rows, 1, generator=draw)
            put = torch.rand(tokens.shape, generator=draw) < share
            tokens = torch.where(put, more, tokens)
            first, second = F.one_hot(tokens, self.classes).sum(1).topk(2, -1).values.unbind(-1)
            found.append(tokens[first - second >= self.margin])
        tokens = torch.cat(found)[:rows].to(self.device)
        return tokens, F.one_hot(tokens, self.classes).sum(1).argmax(-1)
