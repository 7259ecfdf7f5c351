"""Head pursuit: which tokens a head writes about, by greedy search among the unembedding's directions.

    X = z_h W_O,h of many samples, minus its mean                          [samples, width]
    repeat k times, R = X at first
        a ← argmax over atoms not yet chosen of Σ_samples |R · u_a|      u_a: unembedding rows, ‖u_a‖ = 1
        C ← argmin ‖X − C U_chosen‖,   R ← X − C U_chosen                  all chosen are fitted anew
    explained = Σ_features var(C U_chosen) / Σ_features var(X)

Over a concept's rows alone (its words), the variance explained ranks heads; those chosen are scaled,
z_h → α z_h with α ≤ 0 to suppress the concept and α > 1 to enhance it.

Cost: per head one product with the dictionary, O(samples · width · atoms), and O(samples · k · atoms) a
step. No last norm is applied to what heads write.

Source: "Head Pursuit: Probing Attention Specialization in Multimodal Transformers".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas.attach import attach
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.inspect.prompts import one_token
from attlas.inspect.readout import readout
from attlas.inspect.runs import by_layer
from attlas.inspect.subject import Subject
from attlas.inspect.weights import head_weights
from attlas.kinds.analysis import Analysis, Findings, Scores, Table
from attlas.options import option
from attlas.parts.patch.ablate_heads import AblateHeads
from attlas.parts.record.activations import Activations


@dataclass(frozen=True)
class Pursuit:
    """What a pursuit found.

    Attributes:
        chosen: atoms in the order of their choice.
        coefficients: of the last fit.
        reconstruction: of X from them, its mean included.
        explained: share of the variance, behind each step.
        residuals: ‖R‖ behind each step.
    """

    chosen: Int[Tensor, " k"]
    coefficients: Float[Tensor, "samples k"]
    reconstruction: Float[Tensor, "samples width"]
    explained: Float[Tensor, " k"]
    residuals: Float[Tensor, " k"]


def pursued(
    x: Float[Tensor, "samples width"], dictionary: Float[Tensor, "atoms width"], k: int,
    *, centred: bool = True,
) -> Pursuit:  # fmt: skip
    """Simultaneous orthogonal matching pursuit; atoms are taken as they are, of whatever length.

    Raises:
        ValueError: fewer atoms than steps.
    """
    if not 1 <= k <= len(dictionary):
        raise UserError(f"k must be between 1 and the {len(dictionary)} atoms, got {k}")
    mean = x.mean(dim=0) if centred else torch.zeros_like(x[0])
    x = x - mean
    whole = x.var(dim=0).sum()
    products = x @ dictionary.T
    scores, chosen = products, list[int]()
    explained, residuals = [], []
    for _ in range(k):
        summed = scores.abs().sum(dim=0)
        summed[chosen] = -torch.inf
        chosen.append(int(summed.argmax()))
        atoms = dictionary[chosen]
        c = x @ torch.linalg.pinv(atoms)
        made = c @ atoms
        scores = products - c @ (atoms @ dictionary.T)
        share = made.var(dim=0).sum() / whole
        explained.append(torch.where(whole > 0, share, 0.0))  # of nothing, nothing
        residuals.append((x - made).norm())
    found = torch.tensor(chosen, device=x.device)
    return Pursuit(found, c, made + mean, torch.stack(explained), torch.stack(residuals))


@mechanism("head-pursuit", paper="head-pursuit")
class HeadPursuit(Analysis):
    """Ranks heads by how much of what they write a concept's words explain, or tells their own words."""

    needs = "text"
    inspects = "weights"

    concept: tuple[str, ...] = option(
        "words of one token each; the whole vocabulary unless given", default=(), kw_only=False
    )
    k: int = option("directions that are pursued", default=5, at_least=1)
    at: Literal["all", "last"] = option("tokens of each text that are samples", default="all")
    samples: int = option("of them at most, drawn evenly", default=64, at_least=2)
    told: int = option("heads whose directions are told", default=10, at_least=1)

    def check(self, subject: Subject) -> None:
        """Refuse a concept without a tokenizer, and too few samples for a variance."""
        if self.concept and subject.tokenizer is None:
            raise UserError("concept is in words: give the model's tokenizer, Subject(tokenizer=...)")
        if self.concept and len(set(self.concept)) < self.k:
            raise UserError(f"concept has {len(set(self.concept))} words and k={self.k} are pursued")
        if int(self._samples(subject.valid).sum()) < 2:
            raise UserError("head-pursuit needs at least two samples: longer texts, or more of them")

    def run(self, subject: Subject, tick: Callable[[float], None]) -> Findings:
        """The pursuit of each head."""
        tokens = self.tokens(subject)
        dictionary = atoms(subject, tokens)
        written = self.written(subject, tick)
        found = [[pursued(x, dictionary, self.k) for x in layer] for layer in written]
        last = [torch.stack([p.explained[-1] for p in layer]) for layer in found]
        explained = torch.stack(last).double()
        chosen = torch.stack([torch.stack([tokens[p.chosen] for p in layer]) for layer in found])
        what = f"{len(tokens)} words" if self.concept else "the vocabulary"
        scores = Scores(explained, f"variance of the head's output that {self.k} of {what} explain")
        say: Callable[[int], str] = str
        if subject.tokenizer is not None:
            say = lambda i: subject.tokenizer.decode([i])  # noqa: E731
        rows = [(layer, head, float(explained[layer, head]),
                 " ".join(map(say, chosen[layer, head].tolist())))
                for layer, head in scores.top(self.told)]  # fmt: skip
        columns = ("layer", "head", "explained", "directions")
        return Findings(
            heads={"explained": scores},
            arrays={"chosen": chosen},
            tables=[Table("What heads write about", columns, rows)],
        )

    def tokens(self, subject: Subject) -> Int[Tensor, " atoms"]:
        """The tokens of the dictionary."""
        if self.concept:
            words = dict.fromkeys(f" {word}" for word in self.concept)
            ids = torch.tensor([one_token(word, subject.tokenizer) for word in words])
        else:
            ids = torch.arange(len(readout(subject.model).bias))
        return ids.to(subject.device)

    def written(
        self, subject: Subject, tick: Callable[[float], None] = lambda share: None
    ) -> list[Float[Tensor, "heads samples width"]]:
        """What each head of each layer writes into the stream at the samples."""
        recorder = Activations(("heads",))
        with attach(subject.model, record=[recorder], compile=False):
            subject.forward()
        given = recorder.result()["heads"]  # [layers, rows, tokens, heads, dim]
        rows, columns = self._samples(subject.valid).nonzero(as_tuple=True)
        even = torch.linspace(0, len(rows) - 1, min(self.samples, len(rows))).round().long()
        found = []
        for layer, z in enumerate(given):
            taken = z[rows[even], columns[even]]
            found.append(torch.einsum("shd,hdw->hsw", taken, head_weights(subject.model, layer).o))
            tick((layer + 1) / (2 * len(given)))
        return found

    def _samples(self, valid: Tensor) -> Tensor:
        """Which tokens are samples."""
        if self.at == "all":
            return valid
        places = torch.arange(valid.shape[1], device=valid.device)
        last = torch.where(valid, places, -1).amax(dim=1, keepdim=True)
        return places == last


def atoms(subject: Subject, tokens: Int[Tensor, " n"]) -> Float[Tensor, "n width"]:
    """The unembedding's directions of some tokens, each of length 1."""
    return torch.nn.functional.normalize(readout(subject.model).weight[:, tokens].T, dim=-1)


def scaled(scores: Scores, share: float = 0.01, scale: float = -1.0) -> AblateHeads:
    """A part that suppresses (scale ≤ 0) or enhances (scale > 1) what the best heads write.

    Args:
        scores: of heads, as the pursuit of a concept gives them.
        share: of all heads, at least one.
        scale: α.
    """
    count = max(1, round(share * scores.values.numel()))
    chosen: Any = {layer: tuple(heads) for layer, heads in by_layer(scores.top(count)).items()}
    return AblateHeads(heads=chosen, scale=scale)
