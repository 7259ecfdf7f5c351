"""Reference frames: attention as a graph that has one centre, several, or one at either end.

    r_j        = Σ_{i≠j} A_ij / (queries i ≠ j that see j)       heads and layers averaged
    hubs       tokens with r_j > max r / 2 and r_j > 4 mean r
    edges      of two tokens where max(A_ij, A_ji) > 2 / T
    degree centralisation = Σ_j (max d − d_j) / ((T − 1)(T − 2)),  1 for a star, 0 where all are alike
    algebraic connectivity = second smallest eigenvalue of the graph's Laplacian D − E
    persistence            = total lifetime of components (H0) and loops (H1) as 1 − max(A, Aᵀ) grows
    alignment              = mean cosine of the other tokens' states, and values, with those of argmax r

    centralized     one hub
    bidirectional   hubs in the first and in the last tenth, and none between
    distributed     other hubs, or none

The paper's three types are taken; its exact formulas and thresholds are not known here. Hubs, the shares
of tokens above and the rule that names the type are this file's own; the paper's measurements stand
beside them.

Cost: that of the maps; T³ for the spectrum, and for loops at most the triangles of `POINTS` tokens.
Reduces to the sink of plain column sums where one column is all there is.
Source: "What are you sinking? A geometric approach on attention sink".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn import functional as F

from attlas.attach.session import attach
from attlas.catalog.registry import mechanism
from attlas.kinds.study import Row, Study, Within
from attlas.options import option
from attlas.parts.record.activations import Activations

CENTRALIZED, BIDIRECTIONAL, DISTRIBUTED = "centralized", "bidirectional", "distributed"
#: Tokens whose loops are counted, spread evenly over a longer text.
POINTS = 24
#: Columns that fewer of the queries see have no mean worth the name: the last ones of a causal map.
SEEN = 0.125
#: By how much a hub exceeds the mean, and the share of the largest that it reaches.
ABOVE, OF_LARGEST = 4.0, 0.5
#: Share of the text that is an end.
END = 0.1


class Frame(NamedTuple):
    """A map of attention as a graph.

    Attributes:
        kind: centralized, bidirectional or distributed.
        hubs: the tokens that make it so.
        concentration: share of all attention received that the largest column has.
        centralisation: of degrees.
        connectivity: algebraic.
        components: total persistence of H0.
        loops: of H1.
        states: alignment of what enters the layers with the most received token's, their mean.
        values: of their values likewise.
    """

    kind: str
    hubs: tuple[int, ...]
    concentration: float
    centralisation: float
    connectivity: float
    components: float
    loops: float
    states: float = 0.0
    values: float = 0.0


def frame_of(weights: Float[Tensor, "tokens tokens"], causal: bool) -> Frame:
    """What graph a map of attention is.

    Raises:
        ValueError: fewer than four tokens.
    """
    tokens = len(weights)
    if tokens < 4:
        raise ValueError(f"weights must be of at least 4 tokens, got {tokens}")
    received = received_by(weights, causal)
    above = (received > ABOVE * received.mean()) & (received > OF_LARGEST * received.max())
    hubs = tuple(above.nonzero().flatten().tolist())
    pairs = torch.maximum(weights, weights.mT).double().fill_diagonal_(0.0)
    edges = (pairs > 2 / tokens).double()
    degrees = edges.sum(-1)
    spectrum = torch.linalg.eigvalsh(torch.diag(degrees) - edges)
    some = torch.linspace(0, tokens - 1, min(tokens, POINTS)).round().long()
    components, loops = persistence(1 - pairs[some][:, some].clamp(max=1.0))
    return Frame(
        _kind(hubs, tokens), hubs, float(received.max() / received.sum().clamp(min=1e-12)),
        float((degrees.max() - degrees).sum() / ((tokens - 1) * (tokens - 2))),
        float(spectrum[1].clamp(min=0)), components, loops,
    )  # fmt: skip


def received_by(weights: Float[Tensor, "tokens tokens"], causal: bool) -> Float[Tensor, " tokens"]:
    """Mean attention of the other queries that see each token; 0 where too few do."""
    tokens = len(weights)
    there = ~torch.eye(tokens, dtype=torch.bool, device=weights.device)
    there = there.tril() if causal else there
    seeing = there.sum(0)
    received = (weights * there).sum(0) / seeing.clamp(min=1)
    return received.masked_fill(seeing < max(1.0, SEEN * tokens), 0.0)


def _kind(hubs: tuple[int, ...], tokens: int) -> str:
    """The type that hubs make."""
    if len(hubs) == 1:
        return CENTRALIZED
    end = max(1, int(END * tokens))
    first, last = sum(hub < end for hub in hubs), sum(hub >= tokens - end for hub in hubs)
    return BIDIRECTIONAL if first and last and first + last == len(hubs) else DISTRIBUTED


def persistence(distance: Float[Tensor, "points points"]) -> tuple[float, float]:
    """Total lifetimes of components and loops of the Vietoris–Rips filtration, to the largest distance.

    Boundaries are reduced column by column, with sets for sums modulo 2.
    """
    d = distance.tolist()
    edges = sorted(combinations(range(len(d)), 2), key=lambda e: d[e[0]][e[1]])
    order = {edge: n for n, edge in enumerate(edges)}
    length = [d[a][b] for a, b in edges]
    root, components, births = list(range(len(d))), 0.0, set()

    def find(at: int) -> int:
        while root[at] != at:
            at = root[at]
        return at

    for n, (a, b) in enumerate(edges):
        x, y = find(a), find(b)
        if x == y:
            births.add(n)  # closes a loop
        else:
            root[x] = y
            components += length[n]
    sides = [
        {order[a, b], order[a, c], order[b, c]} for a, b, c in combinations(range(len(d)), 3)
    ]
    reduced: dict[int, set[int]] = {}
    loops = 0.0
    for boundary in sorted(sides, key=max):
        column, death = set(boundary), max(boundary)
        while column and max(column) in reduced:
            column ^= reduced[max(column)]
        if column:
            born = max(column)
            reduced[born] = column
            births.discard(born)
            loops += length[death] - length[born]
    return components, loops + sum(length[-1] - length[n] for n in births)


def alignment(states: Float[Tensor, "*layers tokens width"], hub: int) -> float:
    """Mean cosine of the other tokens' states, or values, with the hub's."""
    cosines = F.cosine_similarity(states, states[..., hub : hub + 1, :], dim=-1)
    others = torch.arange(cosines.shape[-1], device=cosines.device) != hub
    return float(cosines[..., others].mean())


def frames(
    model: Any, inputs: dict[str, Tensor], causal: bool
) -> list[Frame]:
    """The frame of each text, of its maps' mean over heads and layers."""
    passing = Activations(("residual", "v"))
    with torch.no_grad(), attach(model, record=["weights", passing]) as session:
        model(**inputs)
    found, seen = [], {name: x.float() for name, x in passing.result().items()}
    for row, one in enumerate(session["weights"].float().mean(dim=(0, 2))):
        hub = int(received_by(one, causal).argmax())
        states, values = (alignment(seen[name][:, row].flatten(2), hub) for name in ("residual", "v"))
        found.append(frame_of(one, causal)._replace(states=states, values=values))
    return found


@mechanism(
    "sink-reference-frames", paper="sink-reference-frames",
    example={"steps": 4, "batch": 2, "length": 8, "dim": 8, "layers": 2, "heads": 2, "texts": 2,
             "looks": 2},
)  # fmt: skip
class SinkReferenceFrames(Study):
    """The frames of small language models with rotary, absolute and no positions, while they train."""

    claim = (
        "a model's reference frame is settled early in training, and its position scheme decides which "
        "one it is"
    )
    expects = (
        Within("rotary and absolute differ", least=1.0),
        *(Within(f"settled, {name}", most=20.0) for name in ("rotary", "absolute", "none")),
    )
    axis = "share of the steps"

    steps: int = option("of AdamW", default=600, at_least=1)
    rate: float = option("highest learning rate", default=3e-3, above=0)
    batch: int = option("rows of a step", default=32, at_least=1)
    length: int = option("bytes of a text", default=64, at_least=4)
    dim: int = option("width of the models", default=64, at_least=1)
    layers: int = option("of a model", default=2, at_least=1)
    heads: int = option("of each layer", default=4, at_least=1)
    texts: int = option("held-out texts whose frames vote", default=16, at_least=1)
    looks: int = option("checkpoints, evenly spaced", default=10, at_least=2)

    @property
    def set_up(self) -> str:
        """What is trained, and when it is looked at."""
        return (
            f"bytes of Shakespeare, {self.length} a text, {self.steps} steps, {self.layers} layers, dim "
            f"{self.dim}; most frequent frame of {self.texts} texts at {self.looks} checkpoints"
        )

    def run(self, seed: int) -> Iterator[Row]:
        """Train the three, and tell what they come to and when."""
        last: dict[str, str] = {}
        for name, position in (("rotary", "rope"), ("absolute", "learned"), ("none", "none")):
            found = self._trained(seed, position)
            kinds = [kind for _, _, kind, _ in found]
            last[name] = kinds[-1]
            for step, measured, kind, share in found:
                at = round(step / self.steps, 4)
                yield Row(f"{name}, centralized", float(kind == CENTRALIZED), "", at=at)
                yield Row(f"{name}, votes", share, "%", at=at)
                for what in Frame._fields[2:]:
                    yield Row(f"{name}, {what}", getattr(measured, what), "", at=at)
            changed = [n for n, kind in enumerate(kinds) if kind != kinds[-1]]
            settled = found[changed[-1] + 1][0] if changed else found[0][0]
            yield Row(f"settled, {name}", 100 * settled / self.steps, "% of the steps", "lower")
            for kind in (CENTRALIZED, BIDIRECTIONAL, DISTRIBUTED):
                yield Row(f"{name} ends {kind}", float(kinds[-1] == kind))
        yield Row("rotary and absolute differ", float(last["rotary"] != last["absolute"]))

    def _trained(self, seed: int, position: str) -> list[tuple[int, Frame, str, float]]:
        """(steps done, the mean of what is measured, the frame of most texts, its share of them in %)."""
        from attlas.models.decoder import Decoder, DecoderConfig
        from attlas.tasks.train.shakespeare_bytes import text_bytes, windows
        from attlas.train.small import fit

        torch.manual_seed(seed)
        draw = Generator().manual_seed(seed)
        config = DecoderConfig(
            vocab_size=256, hidden_size=self.dim, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, position=position, max_position_embeddings=self.length,
        )  # fmt: skip
        model = Decoder(config).to(self.device)
        texts = windows(draw, text_bytes(), self.texts, self.length, "test").to(self.device)
        found: list[tuple[int, Frame, str, float]] = []
        every = max(1, self.steps // self.looks)

        def look(step: int) -> None:
            if step and (step % every == 0 or step == self.steps):
                seen = frames(model, {"input_ids": texts}, causal=True)
                kind, votes = Counter(frame.kind for frame in seen).most_common(1)[0]
                numbers = torch.tensor([frame[2:] for frame in seen], dtype=torch.float64).mean(0)
                found.append((step, Frame(kind, (), *numbers.tolist()), kind, 100 * votes / len(seen)))

        def loss() -> Tensor:
            rows = windows(draw, text_bytes(), self.batch, self.length + 1, "train").to(self.device)
            return F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())

        fit(model, loss, self.steps, self.rate, look)
        return found
