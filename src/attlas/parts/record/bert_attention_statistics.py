"""BERT's attention in numbers: where each head's weights fall, how alike heads are, and a probe.

    self, next, previous   Σ_i A_ii / n,  Σ_i A_i,i+1 / n,  Σ_i A_i,i−1 / n        n tokens
    mass on a group G      Σ_i Σ_{j ∈ G} A_ij / n            [CLS], [SEP], punctuation
    entropy                mean_i −Σ_j p_ij ln p_ij,         p = (1 − 1e-4) A + 1e-4 / n;  of row 0 too
    distance of heads      Σ_i JS(p_i, q_i) in nats,         p = (1 − 1e-3) A + 1e-3 / n
    probe                  p(i | j) ∝ exp Σ_k (w_k A^k_ij + u_k A^k_ji)

Each document is first reduced to one number a head, then documents are averaged; distances are summed.
Quirks of the published program kept: neighbours are divided by n though one token has none; [SEP] to
[SEP] is divided by 2 and the rest to [SEP] by n − 2, whatever the number of [SEP].

Cost: all weights of a text are held; distances are O((layers · heads)² · n²).

Source: "What Does BERT Look At? An Analysis of BERT's Attention".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from attlas.attach.call import ForwardPass
from attlas.catalog.registry import mechanism
from attlas.kinds.analysis import Scores
from attlas.parts.record.weights import Weights

#: Shares of the even row that weights are smoothed with.
ENTROPY, DISTANCE = 1e-4, 1e-3

Maps = Float[Tensor, "*heads n n"]


def smoothed(maps: Maps, share: float) -> Maps:
    """(1 − share) A + share / n."""
    return (1 - share) * maps + share / maps.shape[-1]


def statistics(
    maps: Float[Tensor, "*heads n n"], groups: Mapping[str, Bool[Tensor, " n"]] | None = None
) -> dict[str, Float[Tensor, "*heads"]]:
    """The numbers of one document.

    Args:
        maps: its weights.
        groups: tokens of kinds by name; of one called "sep" are told also "sep_sep" and "rest_sep".
    """
    n = maps.shape[-1]
    near = {"self": 0, "right": 1, "left": -1}
    found = {name: maps.diagonal(at, -2, -1).sum(-1) / n for name, at in near.items()}
    for name, group in (groups or {}).items():
        found[name] = maps[..., group].sum(dim=(-2, -1)) / n
    if groups and "sep" in groups:
        sep = groups["sep"]
        found["sep_sep"] = maps[..., sep, :][..., sep].sum(dim=(-2, -1)) / 2
        found["rest_sep"] = maps[..., ~sep, :][..., sep].sum(dim=(-2, -1)) / max(n - 2, 1)
    rows = torch.special.entr(smoothed(maps, ENTROPY)).sum(-1)
    return found | {"entropy": rows.mean(-1), "entropy_cls": rows[..., 0]}


def averaged(documents: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each number over documents."""
    return {name: torch.stack([each[name] for each in documents]).mean(0) for name in documents[0]}


def distances(maps: Float[Tensor, "heads n n"]) -> Float[Tensor, "heads heads"]:
    """Σ_i JS of every two heads' rows, one document."""
    p = smoothed(maps, DISTANCE)
    own = torch.special.entr(p).sum(dim=(-2, -1))
    found = [
        torch.special.entr((p + one) / 2).sum(dim=(-2, -1)) - (own + own[at]) / 2
        for at, one in enumerate(p)
    ]
    return torch.stack(found).clamp(min=0)


def embedded(distance: Float[Tensor, "heads heads"], dims: int = 2) -> Float[Tensor, "heads dims"]:
    """Heads as points whose distances are like the given ones: classical multidimensional scaling."""
    square = distance.double().square()
    centred = -0.5 * (square - square.mean(0) - square.mean(1, keepdim=True) + square.mean())
    values, vectors = torch.linalg.eigh(centred)
    points: Tensor = vectors[:, -dims:].flip(1) * values[-dims:].flip(0).clamp(min=0).sqrt()
    return points


def relation_accuracy(
    maps: Float[Tensor, "heads n n"], dependents: Int[Tensor, " pairs"], targets: Int[Tensor, " pairs"]
) -> Float[Tensor, " heads"]:
    """How often each head's largest weight of a dependent falls on its target; itself does not count."""
    blind = maps.masked_fill(torch.eye(maps.shape[-1], dtype=torch.bool, device=maps.device), -1.0)
    return (blind[:, dependents].argmax(-1) == targets).to(maps.dtype).mean(-1)


class Probe(torch.nn.Module):
    """p(i | j): which token i is the head of token j, from all heads' weights in both directions."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(heads))
        self.u = torch.nn.Parameter(torch.zeros(heads))

    def forward(self, maps: Float[Tensor, "heads n n"]) -> Float[Tensor, "n n"]:
        """ln p(i | j), [j, i]; no token is its own head."""
        scores = torch.einsum("k,kij->ji", self.w, maps) + torch.einsum("k,kji->ji", self.u, maps)
        eye = torch.eye(maps.shape[-1], dtype=torch.bool, device=maps.device)
        return scores.masked_fill(eye, -torch.inf).log_softmax(-1)

    def fit(
        self,
        documents: Sequence[tuple[Maps, Int[Tensor, " pairs"], Int[Tensor, " pairs"]]],
        steps: int = 200,
        rate: float = 0.1,
    ) -> Probe:
        """Learn from documents: maps, dependents, and the head of each."""
        optimiser = torch.optim.Adam(self.parameters(), lr=rate)
        with torch.enable_grad():
            for _ in range(steps):
                optimiser.zero_grad()
                each = [F.nll_loss(self(maps)[j], i) for maps, j, i in documents]
                torch.stack(each).mean().backward()
                optimiser.step()
        return self

    @torch.no_grad()
    def predict(self, maps: Float[Tensor, "heads n n"]) -> Int[Tensor, " n"]:
        """The likeliest head of each token."""
        found: Tensor = self(maps).argmax(-1)
        return found


@mechanism("bert-attention-statistics", paper="bert-attention-statistics")
class BertAttentionStatistics(Weights):
    """Records all weights, and tells the paper's numbers of them."""

    def begin(self, forward_pass: ForwardPass) -> None:
        """Keep which tokens are no padding."""
        super().begin(forward_pass)
        self._valid = forward_pass.valid

    def numbers(
        self, groups: Mapping[str, Bool[Tensor, " n"]] | None = None, row: int = 0
    ) -> dict[str, Float[Tensor, "layers heads"]]:
        """The numbers of one row of the batch, without padding; groups are of the rest."""
        return statistics(self._maps(row), groups)

    def distances(self, row: int = 0) -> Float[Tensor, "heads heads"]:
        """How far apart heads are, layer · heads + head."""
        return distances(self._maps(row).flatten(0, 1))

    def head_scores(self) -> dict[str, Scores]:
        """The numbers that need no tokens' names, over rows."""
        rows = range(self.result().shape[1])
        found = averaged([self.numbers(row=row) for row in rows])
        meaning = {
            "self": "weight on the token itself", "right": "weight on the next token",
            "left": "weight on the token before", "entropy": "entropy of rows, in nats",
            "entropy_cls": "entropy of the first token's row, in nats",
        }  # fmt: skip
        return {name: Scores(x.double(), meaning[name]) for name, x in found.items()}

    def _maps(self, row: int) -> Float[Tensor, "layers heads n n"]:
        """The weights of one row of the batch, between tokens that are no padding."""
        maps: Tensor = self.result()[:, row]
        if self._valid is None:
            return maps
        kept = self._valid[row, : maps.shape[-1]].to(maps.device)
        return maps[..., kept, :][..., kept]
