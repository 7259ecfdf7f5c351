"""Attention against explanations after the fact, where all of them have closed forms.

One layer of attention without biases reads a text whose first token is [cls]; logits are w · Σ_t α_t v_t
of the [cls] row, the mean over heads, each with its own w:

    attention   α_t, the mean or the largest over heads
    gradient    mean_h α_t [ (W_kᵀ q/√d) ((v_t − v̄) · w) + W_vᵀ w ],    v̄ = Σ_s α_s v_s
    LIME        3/2 mean_h Σ_{t of the word} (α_t v_t − α'_t v'_t) · w

The gradient is the logit's by the embedding of word t, which q, made of [cls] alone, does not depend on.
LIME fits a line to logits of documents in which random words are masked; its coefficients tend to the
closed form as documents grow long. Primes: the document with every word masked. Attention is positive,
and cannot tell a word that speaks for a class from one that speaks against it; gradient and LIME can.

Cost: closed forms are one pass; LIME takes a forward pass for every sample.
Source: "Attention Meets Post-hoc Interpretability: A Mathematical Perspective".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from attlas.catalog.registry import mechanism
from attlas.kinds.study import Beats, Row, Study, Within
from attlas.options import option

#: Documents of a batch in LIME's sampling.
BATCH = 2000


class Read(NamedTuple):
    """What the [cls] row of each head sees."""

    weights: Float[Tensor, "*rows heads tokens"]
    values: Float[Tensor, "*rows heads tokens value_dim"]
    query: Float[Tensor, "*rows heads dim"]


class ClsReader(nn.Module):
    """One layer of heads, each with a classifier of its own; the mean of their logits counts."""

    def __init__(
        self, vocabulary: int, dim: int, key_dim: int, value_dim: int, heads: int, classes: int,
        positions: Float[Tensor, "tokens dim"],
    ) -> None:  # fmt: skip
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.q, self.k = (nn.Parameter(_drawn(heads, key_dim, dim)) for _ in range(2))
        self.v = nn.Parameter(_drawn(heads, value_dim, dim))
        self.w = nn.Parameter(_drawn(heads, classes, value_dim))
        self.positions: Tensor
        self.register_buffer("positions", positions)

    def embed(self, ids: Int[Tensor, "*rows tokens"]) -> Float[Tensor, "*rows tokens dim"]:
        """Tokens and their places."""
        found: Tensor = self.embedding(ids) + self.positions
        return found

    def read(
        self, e: Float[Tensor, "*rows tokens dim"], asking: Float[Tensor, "*rows dim"] | None = None
    ) -> Read:
        """What the first token attends to; or what another vector in its place would."""
        first = e[..., 0, :] if asking is None else asking
        query = torch.einsum("hkd,...d->...hk", self.q, first)
        key = torch.einsum("hkd,...td->...htk", self.k, e)
        value = torch.einsum("hvd,...td->...htv", self.v, e)
        scores = torch.einsum("...hk,...htk->...ht", query, key) / math.sqrt(self.k.shape[1])
        return Read(scores.softmax(dim=-1), value, query)

    def forward(self, e: Float[Tensor, "*rows tokens dim"]) -> Float[Tensor, "*rows classes"]:
        """Logits of embedded documents."""
        seen = self.read(e)
        logits = torch.einsum("...ht,...htv,hcv->...c", seen.weights, seen.values, self.w)
        return logits / len(self.w)


def gradient(
    model: ClsReader, e: Float[Tensor, "tokens dim"], label: int
) -> Float[Tensor, "tokens dim"]:
    """The closed form of the logit's gradient; right at all tokens but the first: its query is fixed."""
    seen, w = model.read(e), model.w[:, label]
    says = torch.einsum("htv,hv->ht", seen.values, w)
    apart = says - (seen.weights * says).sum(dim=-1, keepdim=True)
    asked = torch.einsum("hkd,hk->hd", model.k, seen.query) / math.sqrt(model.k.shape[1])
    direct = torch.einsum("hvd,hv->hd", model.v, w)
    both = apart[..., None] * asked[:, None] + direct[:, None]
    return (seen.weights[..., None] * both).mean(dim=0)


def lime(
    model: ClsReader, ids: Int[Tensor, " tokens"], masked: Int[Tensor, " tokens"], words: Sequence[int],
    label: int,
) -> Float[Tensor, " words"]:  # fmt: skip
    """The closed form of LIME's coefficients for large samples and long documents.

    Args:
        model: whose logit is explained.
        ids: the document.
        masked: the same with every word masked.
        words: tokens of the vocabulary whose coefficients are asked for.
        label: of the logit.
    """
    e, there = model.embed(ids), model.embed(masked)
    seen, blank = model.read(e), model.read(there, asking=e[0])
    w = model.w[:, label]
    says = [(one.weights * torch.einsum("htv,hv->ht", one.values, w)).mean(dim=0)
            for one in (seen, blank)]  # fmt: skip
    return 1.5 * torch.stack([((says[0] - says[1]) * (ids == word)).sum() for word in words])


@torch.no_grad()
def lime_fit(
    model: ClsReader, ids: Int[Tensor, " tokens"], mask_id: int, words: Sequence[int], label: int,
    samples: int, draw: Generator,
) -> Float[Tensor, " words"]:  # fmt: skip
    """LIME itself: a weighted line through logits of documents with random words masked.

    The number of masked words is drawn evenly from 1 to all, then that many of them; a sample weighs
    exp(−d²/(2 · 25²)), d being 100 times the cosine distance to the whole document.
    """
    count, at = len(words), torch.stack([ids == word for word in words])
    many = torch.randint(1, count + 1, (samples, 1), generator=draw)
    order = torch.rand(samples, count, generator=draw).argsort(dim=1).argsort(dim=1)
    kept: Bool[Tensor, "samples words"] = order >= many
    logits = []
    for some in kept.split(BATCH):
        gone = ((~some)[:, :, None] & at).any(dim=1)
        logits.append(model(model.embed(torch.where(gone, mask_id, ids)))[:, label])
    x = torch.cat([torch.ones(samples, 1), kept], dim=1).double()
    distance = 100 * (1 - (kept.double().sum(dim=1) / count).sqrt())
    weights = (-distance.square() / (2 * 25**2)).exp().sqrt()[:, None]
    y = torch.cat(logits).double()[:, None]
    found: Tensor = torch.linalg.lstsq(weights * x, weights * y).solution
    return found[1:, 0].to(model.w.dtype)


@mechanism("attention-vs-posthoc", example={"length": 12, "samples": 300, "steps": 20, "documents": 3})
class AttentionVsPosthoc(Study):
    """Attention, gradient and LIME of a trained reader, against their closed forms and word by word."""

    claim = (
        "explanations after the fact have closed forms that use more than attention weights, and tell "
        "words that speak against a class from those that speak for it, as attention cannot"
    )

    length: int = option("words of a document", default=60, at_least=4)
    samples: int = option("masked documents that LIME draws", default=20000, at_least=100)
    documents: int = option("documents explained", default=10, at_least=1)
    steps: int = option("of Adam", default=300, at_least=1)
    vocabulary: int = option("words; a tenth are good, a tenth bad", default=200, at_least=20)
    dim: int = option("width of embeddings", default=32, at_least=2)
    heads: int = option("of the layer", default=4, at_least=1)

    on_gpu = False
    expects = (
        Beats("gradient tells signs", "attention tells signs"),
        Beats("LIME tells signs", "attention tells signs"),
        Within("gradient, error", most=1e-6),
        Within("LIME, correlation", least=0.95),
    )

    @property
    def set_up(self) -> str:
        """What is trained and how much is drawn."""
        return (
            f"one layer of {self.heads} heads trained to tell whether good or bad words prevail in "
            f"{self.length}; {self.documents} documents, {self.samples} samples each for LIME"
        )

    def run(self, seed: int) -> Iterator[Row]:
        """How far closed forms are off, and how often good words come before bad ones."""
        draw = Generator().manual_seed(seed)
        model = self.trained(draw)
        off, alike = [], []
        right: dict[str, list[float]] = {"attention": [], "gradient": [], "LIME": []}
        for _ in range(self.documents):
            ids = self.document(draw)
            e = model.embed(ids).detach().requires_grad_()
            (true,) = torch.autograd.grad(model(e)[1], e)
            with torch.no_grad():
                closed = gradient(model, e, 1)
                words = ids[1:].unique().tolist()
                masked = torch.where(ids == 0, 0, 1)
                told = lime(model, ids, masked, words, 1)
                fitted = lime_fit(model, ids, 1, words, 1, self.samples, draw)
                weights = model.read(e).weights.mean(dim=0)
                by_word = {
                    "attention": torch.stack([weights[ids == word].sum() for word in words]),
                    "gradient": torch.stack([((true * e).sum(-1))[ids == w].sum() for w in words]),
                    "LIME": fitted,
                }
            off.append(float((closed - true)[1:].abs().max() / true.abs().max()))
            alike.append(float(torch.corrcoef(torch.stack([told, fitted]))[0, 1]))
            for name, scores in by_word.items():
                right[name].append(self.ordered(scores, torch.tensor(words)))
        yield Row("gradient, error", max(off), "", "lower")
        # Rounded: least squares may end on another last bit in another place of memory.
        yield Row("LIME, correlation", round(sum(alike) / len(alike), 9))
        for name, shares in right.items():
            yield Row(f"{name} tells signs", 100 * sum(shares) / len(shares), "%")

    def trained(self, draw: Generator) -> ClsReader:
        """A reader that tells whether good or bad words prevail, in float64."""
        at = torch.arange(self.length + 1)[:, None] / 10000 ** (torch.arange(0, self.dim, 2) / self.dim)
        places = torch.stack([at.sin(), at.cos()], dim=-1).flatten(1)[:, : self.dim]
        size = self.vocabulary + 2  # 0 is [cls], 1 the mask
        model = ClsReader(size, self.dim, self.dim, self.dim, self.heads, 2, 0.1 * places).double()
        adam = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(self.steps):
            ids = torch.stack([self.document(draw) for _ in range(32)])
            good = (self.signs(ids).sum(dim=1) > 0).long()
            loss = nn.functional.cross_entropy(model(model.embed(ids)), good)
            adam.zero_grad()
            loss.backward()
            adam.step()
        return model.requires_grad_(False)

    def signs(self, ids: Int[Tensor, "*rows"]) -> Int[Tensor, "*rows"]:
        """1 of good words, −1 of bad ones, 0 of all others."""
        tenth, word = self.vocabulary // 10, ids - 2
        return ((word >= 0) & (word < tenth)).long() - ((word >= tenth) & (word < 2 * tenth)).long()

    def document(self, draw: Generator) -> Int[Tensor, " tokens"]:
        """[cls] and words, of which at least one is good and one bad."""
        ids = torch.randint(2, self.vocabulary + 2, (self.length + 1,), generator=draw)
        tenth = self.vocabulary // 10
        ids[0] = 0
        ids[1] = 2 + int(torch.randint(tenth, (1,), generator=draw))
        ids[2] = 2 + tenth + int(torch.randint(tenth, (1,), generator=draw))
        return ids

    def ordered(self, scores: Float[Tensor, " words"], words: Int[Tensor, " words"]) -> float:
        """The share of pairs of a good and a bad word in which the good one has the larger score."""
        sign = self.signs(words)
        return float((scores[sign == 1][:, None] > scores[sign == -1][None]).double().mean())


def _drawn(*shape: int) -> Tensor:
    """Uniform as in a linear layer of PyTorch."""
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(*shape).uniform_(-bound, bound)
