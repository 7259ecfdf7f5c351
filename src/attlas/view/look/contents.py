"""What the page shows: plain tensors and words, nothing of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from jaxtyping import Bool, Float, Int
from torch import Tensor

from attlas.errors import UserError
from attlas.parts.record.multiscale_attention_view import Neuron
from attlas.parts.record.pyramid import Pyramid

__all__ = (
    "Circuit", "Compare", "Contents", "Edge", "Flow", "Grid", "HeadOf", "Joint", "Neuron", "Node",
    "Pyramid", "Table",
)  # fmt: skip

#: (layer, head), both from 0.
HeadOf: TypeAlias = tuple[int, int]

#: What a browser holds without a stall: heads of the grid, numbers of all patterns, tokens.
HEADS, NUMBERS, TOKENS = 20_000, 40_000_000, 131_072


@dataclass(frozen=True)
class Grid:
    """A score of every head; NaN where it has none. `meaning` is a sentence."""

    values: Float[Tensor, "layers heads"]
    meaning: str = ""


@dataclass(frozen=True)
class Flow:
    """For each layer and token the earlier tokens it takes most from (-1: none), with their shares."""

    index: Int[Tensor, "layers tokens links"]
    share: Float[Tensor, "layers tokens links"]
    meaning: str = ""


@dataclass(frozen=True)
class Node:
    """A node of a circuit; `layer` is -1 for the embedding, and the number of layers for the logits."""

    kind: Literal["head", "mlp", "embedding", "logits"]
    layer: int
    head: int | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Edge:
    """An edge from node `start` to node `end`, by their numbers."""

    start: int
    end: int
    weight: float = 1.0


@dataclass(frozen=True)
class Circuit:
    """Nodes and edges, with a sentence on what their weights are."""

    nodes: Sequence[Node]
    edges: Sequence[Edge]
    meaning: str = ""


@dataclass(frozen=True)
class Joint:
    """Queries and keys of one head in one plane."""

    points: Float[Tensor, "n 2"]
    is_query: Bool[Tensor, " n"]
    position: Int[Tensor, " n"]
    token: Sequence[str]
    norm: Float[Tensor, " n"] | None = None


@dataclass(frozen=True)
class Table:
    """Rows of words and numbers; None is shown as a dash."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]


@dataclass(frozen=True)
class Compare:
    """The same scores of another model, or of this one with a method: shown as B, and as A − B."""

    model: str
    scores: Mapping[str, Grid]


@dataclass(frozen=True)
class Contents:
    """All that one page shows. Views without contents are left out of it.

    Attributes:
        model: its name.
        tokens: of the text, as they are to be read (" the", not "Ġthe").
        scores: grids by their names.
        patterns: of the heads that were recorded.
        neurons: likewise.
        flow: between tokens, layer by layer.
        circuit: a path through the model.
        joint: of the heads that were asked for.
        tables: shown as they are.
        says: sentences of what was found, shown first.
        compare: a second set of scores.
        keys: tokens that are read where they are others (cross attention).

    Raises:
        ValueError: nothing to show, sizes that disagree, or more than a browser can hold.
    """

    model: str
    tokens: Sequence[str]
    scores: Mapping[str, Grid] = field(default_factory=dict)
    patterns: Mapping[HeadOf, Pyramid] = field(default_factory=dict)
    neurons: Mapping[HeadOf, Neuron] = field(default_factory=dict)
    flow: Flow | None = None
    circuit: Circuit | None = None
    joint: Mapping[HeadOf, Joint] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    says: Sequence[str] = ()
    compare: Compare | None = None
    keys: Sequence[str] | None = None

    def __post_init__(self) -> None:
        self._check_sizes()
        grids = dict(self.scores) | {f"{k} of B": g for k, g in (self.compared or {}).items()}
        shapes = {name: tuple(grid.values.shape) for name, grid in grids.items()}
        if len(set(shapes.values())) > 1:
            raise UserError(f"scores take grids of one shape [layers, heads], got {shapes}")
        for name, (layers, heads) in shapes.items():
            if layers * heads > HEADS:
                raise UserError(
                    f"the grid {name!r} has {layers} × {heads} heads and a page holds {HEADS}; "
                    "inspect fewer layers (layers=…)"
                )
        for (layer, head), pattern in self.patterns.items():
            if (pattern.queries, pattern.keys) != (len(self.tokens), len(self.columns)):
                raise UserError(
                    f"the pattern of head {layer}.{head} has {pattern.queries} × {pattern.keys} tokens "
                    f"and the text {len(self.tokens)} × {len(self.columns)}"
                )

    def _check_sizes(self) -> None:
        if not len(self.tokens):
            raise UserError("a page needs a text of at least one token, got none; give text or a file")
        longest = max(len(self.tokens), len(self.columns))
        if longest > TOKENS:
            raise UserError(
                f"the text has {longest} tokens and a page holds {TOKENS}; inspect a part of the text"
            )
        numbers = sum(pattern.numbers for pattern in self.patterns.values())
        if numbers > NUMBERS:
            fit = len(self.patterns) * NUMBERS // numbers
            raise UserError(
                f"patterns of {len(self.patterns)} heads over {longest} tokens are more than a browser "
                f"holds; about {fit} would fit: name the heads that matter (heads={{layer: [head, …]}})"
            )

    @property
    def columns(self) -> Sequence[str]:
        """The tokens that are read."""
        return self.tokens if self.keys is None else self.keys

    @property
    def compared(self) -> Mapping[str, Grid] | None:
        """The second set of scores."""
        return None if self.compare is None else self.compare.scores

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, heads) that the page speaks of."""
        for grid in self.scores.values():
            return int(grid.values.shape[0]), int(grid.values.shape[1])
        named: list[Any] = [*self.patterns, *self.neurons, *self.joint]
        return max((n[0] for n in named), default=-1) + 1, max((n[1] for n in named), default=-1) + 1
