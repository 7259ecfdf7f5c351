"""Sparse decomposition of attention scores: which few directions make a head look, and who wrote them.

    q_i · k_j = x̃_i Ω x̃_jᵀ = Σ_k σ_k (x̃_i · u_k)(v_k · x̃_j),   Ω = W̃_Q R_(i−j) W̃_Kᵀ = U Σ Vᵀ

x̃ = [x, 1], x the normed stream without its gain; the gain and biases are in W̃ = [g ∘ W; b + c W]; R is
the rotation between both places, the identity where the model does not rotate. Of the terms, sorted
towards the sign of the score, the shortest run whose share of the score exceeds `share` is the signal S.
What head a of an earlier layer wrote at the key, w_a, counts with Σ_(k∈S) σ_k (x̃_i · u_k)(v_k · w_a), w_a
divided by the norm's size as the stream is; at the query likewise.

Cost: one run, and the singular values of one matrix of head_dim² for each head and distance.
Reduces to the whole score at share = 1.

Source: "Sparse Attention Decomposition Applied to Circuit Tracing".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attlas.attach.stream import blocks
from attlas.cache.rotations import rotation_of
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.inspect.readout import gain_of, normalised
from attlas.inspect.runs import kept
from attlas.inspect.subject import Subject
from attlas.inspect.weights import attention_of, head_weights
from attlas.kinds.analysis import Analysis, Findings, Needs, Scores
from attlas.options import option
from attlas.parts.patch.replace import Replace

Side: TypeAlias = Literal["query", "key"]
#: Names of the norm before a block's attention.
_NORMS = ("input_layernorm", "ln_1", "attention_norm", "norm1", "ln1", "self_attn_layer_norm")
EDGES = 24


@dataclass(frozen=True)
class Decomposition:
    """Singular vectors of a head's bilinear form, the largest first.

    Attributes:
        u: of queries.
        sigma: singular values.
        v: of keys.
    """

    u: Float[Tensor, "width1 terms"]
    sigma: Float[Tensor, " terms"]
    v: Float[Tensor, "width1 terms"]

    def terms(
        self, query: Float[Tensor, "*#pairs width"], key: Float[Tensor, "*#pairs width"]
    ) -> Float[Tensor, "*pairs terms"]:
        """The score of queries and keys, term by term."""
        return self.sigma * (with_one(query) @ self.u) * (with_one(key) @ self.v)

    def projected(
        self, x: Float[Tensor, "*rows width"], side: Side, chosen: Bool[Tensor, " terms"], keep: bool
    ) -> Float[Tensor, "*rows width"]:
        """x in the space of the chosen vectors of one side, or without what it has there."""
        basis = (self.u if side == "query" else self.v)[:, chosen]
        whole = with_one(x)
        inside = whole @ basis @ basis.T
        return (inside if keep else whole - inside)[..., :-1]


def decompose(
    q: Float[Tensor, "width1 dim"], k: Float[Tensor, "width1 dim"]
) -> Decomposition:
    """The singular vectors of q kᵀ, found between bases of both."""
    (left, a), (right, b) = (torch.linalg.qr(x) for x in (q, k))
    u, sigma, v = torch.linalg.svd(a @ b.T, full_matrices=False)
    return Decomposition(left @ u, sigma, right @ v.T)


def signal(terms: Float[Tensor, "*pairs terms"], share: float) -> Bool[Tensor, "*pairs terms"]:
    """Which terms make up more than a share of their sum, as few as do."""
    total = terms.sum(-1, keepdim=True)
    order = (terms * torch.where(total > 0, 1.0, -1.0)).argsort(dim=-1, descending=True)
    enough = terms.gather(-1, order).cumsum(-1) / total > share
    before = enough.cumsum(-1) - enough.long() == 0  # nothing before it was enough
    return torch.zeros_like(enough).scatter(-1, order, before)


def with_one(x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width1"]:
    """x̃: a coordinate more, which is one."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1)


@mechanism("sparse-attention-decomposition", paper="sparse-attention-decomposition")
class SparseAttentionDecomposition(Analysis):
    """How few terms make each head look where it does from the last token, and which heads wrote them."""

    needs: ClassVar[Needs] = "text"
    inspects = "circuits"

    share: float = option("of a score that its signal exceeds", default=0.7, above=0, at_most=1)

    def check(self, subject: Subject) -> None:
        """Refuse padding."""
        if not bool(subject.valid.all()):
            raise UserError("padding: texts of one length are decomposed; give them one by one")

    def run(self, subject: Subject, tick: Callable[[float], None]) -> Findings:
        """Each head at the key that its last query scores best, the first token left out."""
        assert subject.input_ids is not None
        traced = Traced(subject.model, subject.input_ids.to(subject.device))
        last = subject.input_ids.shape[1] - 1
        sizes = torch.zeros(subject.layers, subject.heads, dtype=torch.float64)
        edges: list[tuple[float, ...]] = []
        for layer in range(subject.layers):
            for head in range(subject.heads):
                scores = traced.scores(layer, head)[:, last]
                best = scores[:, min(1, last) :].mean(0).argmax().item() + min(1, last)
                chosen = traced.signal(layer, head, last, int(best), self.share)
                sizes[layer, head] = chosen.sum(-1).double().mean()
                if layer:
                    wrote = traced.writes(layer, head, last, int(best), "key", chosen).mean(-1)
                    at = int(wrote.flatten().argmax())
                    edges.append((*divmod(at, subject.heads), layer, head, float(wrote.flatten()[at])))
            tick((layer + 1) / subject.layers)
        strongest = torch.tensor(sorted(edges, key=lambda e: -e[-1])[:EDGES], dtype=torch.float64)
        meaning = "terms that make this head look where it looks most; few: a sparse signal"
        return Findings(
            heads={"signal size": Scores(sizes, meaning)}, arrays={"circuit": strongest.reshape(-1, 5)}
        )


class Traced:
    """A run whose scores are decomposed and followed back.

    Args:
        model: with a norm before each attention, without norms of queries and keys.
        ids: texts without padding.
    """

    def __init__(self, model: nn.Module, ids: Int[Tensor, "rows tokens"]) -> None:
        self.model, self.ids = model, ids
        self.norms = {number: _norm(block) for number, block in blocks(model)}
        for layer in self.norms:
            module, *_ = attention_of(model, layer)
            if any("norm" in name for name, _ in module.named_modules()):
                raise UserError(f"{type(module).__name__} norms queries or keys; its scores are no form")
        self.rotations = {x: rotation_of(model, x, "the decomposition of scores") for x in self.norms}
        self.run = kept(model, ids, ("residual", "heads", "q", "k"))

    def inputs(self, layer: int) -> Float[Tensor, "rows tokens width"]:
        """What a layer's attention is given, without the norm's gain."""
        x = self.run.passed["residual"][layer]
        return normalised(self.norms[layer], x, x)

    def weights(
        self, layer: int, head: int
    ) -> tuple[Float[Tensor, "width1 dim"], Float[Tensor, "width1 dim"]]:
        """W̃ of a head's queries and keys: gains and biases within."""
        w, norm = head_weights(self.model, layer), self.norms[layer]
        gain, bias = gain_of(norm), getattr(norm, "bias", None)
        found = []
        for weight, constant in ((w.q[head], w.q_bias[head]), (w.k[head], w.k_bias[head])):
            moved = constant if bias is None else constant + bias @ weight
            scaled = weight if gain is None else gain[:, None] * weight
            found.append(torch.cat([scaled, moved[None]]).detach())
        return found[0], found[1]

    def turned(self, layer: int, x: Float[Tensor, "rows dim"], token: int) -> Float[Tensor, "rows dim"]:
        """Rows as queries or keys are turned at a token's place."""
        rotation = self.rotations[layer]
        if rotation is None:
            return x
        cos, sin = rotation.now().angles(torch.tensor([[token]], device=x.device))
        return rotation.now().turn(x, cos[0].to(x), sin[0].to(x))

    def decomposition(self, layer: int, head: int, query: int, key: int) -> Decomposition:
        """Of a head, between the places of two tokens."""
        q, k = self.weights(layer, head)
        return decompose(self.turned(layer, q, query), self.turned(layer, k, key))

    def scores(self, layer: int, head: int) -> Float[Tensor, "rows tokens tokens"]:
        """q_i · k_j as the model has them."""
        q, k = (self.run.passed[x][layer] for x in "qk")
        serving = head * k.shape[2] // q.shape[2]
        return q[:, :, head] @ k[:, :, serving].mT

    def signal(
        self, layer: int, head: int, query: int, key: int, share: float
    ) -> Bool[Tensor, "rows terms"]:
        """Which terms make the query's score of the key."""
        x, parts = self.inputs(layer), self.decomposition(layer, head, query, key)
        return signal(parts.terms(x[:, query], x[:, key]), share)

    def writes(
        self, layer: int, head: int, query: int, key: int, side: Side, chosen: Bool[Tensor, "rows terms"]
    ) -> Float[Tensor, "earlier heads rows"]:
        """What each earlier head wrote of the signal, at the key or at the query."""
        x, parts = self.inputs(layer), self.decomposition(layer, head, query, key)
        at, other, own, others = (
            (key, query, parts.v, parts.u) if side == "key" else (query, key, parts.u, parts.v)
        )
        along = torch.where(chosen, parts.sigma * (with_one(x[:, other]) @ others), 0.0)
        along = along @ own[:-1].T  # the direction whose product with what is written is its share
        stream = self.run.passed["residual"][layer][:, at]
        found = []
        for earlier in range(layer):
            z, w = self.run.passed["heads"][earlier][:, at], head_weights(self.model, earlier).o
            wrote = torch.einsum("rhd,hdw->hrw", z, w.detach())
            found.append((normalised(self.norms[layer], stream, wrote) * along).sum(-1))
        return torch.stack(found)

    def without(
        self, layer: int, head: int, keys: Bool[Tensor, "rows tokens"],
        basis: Float[Tensor, "width1 directions"],
    ) -> Replace:  # fmt: skip
        """The part that makes a head's keys of tokens without what these hold in a space.

        Args:
            layer: of the head.
            head: whose keys are changed, and those of the heads that share them.
            keys: of which tokens.
            basis: of the space, its columns orthonormal.
        """
        _, k = self.weights(layer, head)
        whole = with_one(self.inputs(layer))
        given = self.run.passed["k"].clone()
        serving = head * given.shape[3] // self.run.passed["q"].shape[3]
        x = whole - whole @ basis @ basis.T
        x[..., -1] = 1.0
        for token in keys.any(0).nonzero().flatten().tolist():
            turned = x[:, token] @ self.turned(layer, k, token)
            rows = keys[:, token]
            given[layer, rows, token, serving] = turned[rows]
        return Replace({"k": given}, heads={layer: [head]})


def _norm(block: nn.Module) -> nn.Module:
    """The norm before a block's attention.

    Raises:
        ValueError: none is known by name.
    """
    found: Any = next((getattr(block, n) for n in _NORMS if hasattr(block, n)), None)
    if found is None:
        raise UserError(
            f"{type(block).__name__} has no norm before its attention by a name that is known"
        )
    return found  # type: ignore[no-any-return]
