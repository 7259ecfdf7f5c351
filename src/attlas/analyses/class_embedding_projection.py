"""A lens for vision transformers: what passes, at any layer and token, in the space of the classes.

    p(h) = E norm(h) + b                     E, b the classifier, norm the model's last
    rank(h)                                  classes that p(h) puts in front of the true one
    identifiability r = 1 − rank / classes   of the stream, and of what attention and MLP add alone
    contribution(Δ) = (E · gain Δ / s)_class   s the size of the last stream: contributions add up
    relevance(i)  = Σ_layers Σ_heads contribution(A_h,0i v_h,i W_O,h)          no gradients
    agreement     = max over memories of cos(E_class, column of the branch's last matrix)

Token 0 is the one that is classified; of models that classify the mean patch, as `attlas.ViT`, the mean
takes its place: of p over the patches, and of A over its rows.

Cost: a forward pass with its maps, and one product with E for each layer and token.

Source: "Analyzing Vision Transformers for Image Classification in Class Embedding Space".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from attlas.attach import attach
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.inspect.blocks import pieces_of
from attlas.inspect.readout import Readout, gained, readout, size_of
from attlas.inspect.subject import Subject
from attlas.inspect.weights import head_weights, matrix, output_projection
from attlas.kinds.analysis import Analysis, Findings, Scores, Table
from attlas.parts.record.activations import Activations


def projected(out: Readout, h: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows classes"]:
    """p(h), the norm's and the classifier's biases included."""
    found: Tensor = out.norm(h) @ out.weight + out.bias
    return found


def ranks(
    p: Float[Tensor, "*rows classes"], classes: Int[Tensor, "*#rows"]
) -> Int[Tensor, "*rows"]:
    """How many classes are in front of one."""
    return (p > p.gather(-1, classes.expand(p.shape[:-1])[..., None])).sum(-1)


def agreement(
    classes: Float[Tensor, "width classes"], memories: Float[Tensor, "memories width"]
) -> Float[Tensor, " classes"]:
    """The largest cosine of each class with any memory."""
    cosines = F.normalize(memories, dim=-1) @ F.normalize(classes, dim=0)
    return cosines.amax(dim=0)


@dataclass(frozen=True)
class Passed:
    """What passed in a run.

    Attributes:
        stream: in front of the first block and behind each, [layers + 1, rows, tokens, width].
        attention: what each adds, [layers, rows, tokens, width].
        mlp: likewise.
        heads: what each head takes of each token for what is classified, over the size s,
            [layers, rows, heads, tokens, value_dim].
    """

    stream: Tensor
    attention: Tensor
    mlp: Tensor
    heads: Tensor


def passed(subject: Subject) -> Passed:
    """Run the pictures and keep what the lens looks at."""
    model = subject.model
    recorder = Activations(("residual", "attention", "mlp", "final", "v"))
    with attach(model, record=[recorder, "weights"], compile=False) as session:
        subject.forward()
        weights = session["weights"]  # [layers, rows, heads, tokens, tokens]
    found = recorder.result()
    stream = torch.cat([found["residual"], found["final"]])
    added = {"attention": list(found["attention"]), "mlp": list(found["mlp"])}
    for layer in range(len(weights)):
        pieces = pieces_of(model, layer)
        for name, scale in (("attention", pieces.attention_scale), ("mlp", pieces.mlp_scale)):
            if scale is not None:
                added[name][layer] = added[name][layer] * scale
    shares = 1 / size_of(readout(model).norm, stream[-1])[..., 0]  # [rows, tokens]
    if classifies_first(model):
        shares[:, 1:] = 0
    else:
        shares = shares / shares.shape[1]
    row = torch.einsum("lrhqk,rq->lrhk", weights.to(shares.dtype), shares)
    v = found["v"].transpose(2, 3)  # [layers, rows, kv_heads, tokens, dim]
    v = v.repeat_interleave(weights.shape[2] // v.shape[2], dim=2)
    parts = {name: torch.stack(each) for name, each in added.items()}
    return Passed(stream, parts["attention"], parts["mlp"], row[..., None] * v)


def classifies_first(model: nn.Module) -> bool:
    """Whether a model has a class token, which is its first."""
    return any(name.rpartition(".")[2] == "cls_token" for name, _ in model.named_parameters())


def relevance(
    subject: Subject, run: Passed, classes: Int[Tensor, " rows"]
) -> Float[Tensor, "rows tokens"]:
    """What attention brings of each token to the class's logit, over all layers and heads."""
    model, out = subject.model, readout(subject.model)
    found = run.stream.new_zeros(run.stream.shape[1:3])
    for layer, parts in enumerate(run.heads):
        written = torch.einsum("rhtd,hdw->rtw", parts, head_weights(model, layer).o)
        scale = pieces_of(model, layer).attention_scale
        found += _logit(out, written if scale is None else written * scale, classes)
    return found


def _logit(out: Readout, piece: Float[Tensor, "rows tokens width"], classes: Tensor) -> Tensor:
    """What a piece of the stream over its size gives of the class's logit, [rows, tokens]."""
    return torch.einsum("rtw,wr->rt", gained(out.norm, piece), out.weight[:, classes])


def by_gradients(
    logits: Float[Tensor, "rows classes"],
    weights: tuple[Float[Tensor, "rows heads tokens tokens"], ...],
    classes: Int[Tensor, " rows"],
) -> Float[Tensor, "rows tokens"]:
    """The map by gradients that the paper compares with: R ← R + mean_h (∇A ∘ A)₊ R, row 0.

    Args:
        logits: that the weights were part of.
        weights: of each layer.
        classes: whose logits are explained.
    """
    gradients = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), weights)
    r = torch.eye(weights[0].shape[-1]).to(weights[0]).expand(len(logits), -1, -1)
    for a, g in zip(weights, gradients, strict=True):
        r = r + (a * g).clamp(min=0).mean(dim=1).detach() @ r
    return r[:, 0]


@mechanism("class-embedding-projection", paper="class-embedding-projection")
class ClassEmbeddingProjection(Analysis):
    """How well each layer of an image classifier tells the class, and what each block and token adds."""

    needs = "pictures"
    inspects = "flow"

    def check(self, subject: Subject) -> None:
        """Refuse what is no classifier of its own stream."""
        out = readout(subject.model)
        width = subject.config.hidden_size
        if out.weight.shape[0] != width:
            raise UserError(
                f"{type(subject.model).__name__}'s classifier reads {out.weight.shape[0]} channels of a "
                f"stream of {width}, so that states cannot be put through it"
            )
        for layer in range(subject.layers):
            head_weights(subject.model, layer)
            pieces_of(subject.model, layer)

    def run(self, subject: Subject, tick: Callable[[float], None]) -> Findings:
        """Identifiability by layer, contributions of blocks and heads, relevance of tokens, memories."""
        out, kept = readout(subject.model), passed(subject)
        tick(0.4)
        pick = self._picked if classifies_first(subject.model) else self._mean
        logits = pick(projected(out, kept.stream))
        classes = logits[-1].argmax(-1) if subject.labels is None else subject.labels.to(logits.device)
        if int(classes.min()) < 0 or int(classes.max()) >= logits.shape[-1]:
            raise UserError(f"labels must be classes from 0 to {logits.shape[-1] - 1}")
        count = logits.shape[-1]
        branches = (("attention", kept.attention), ("mlp", kept.mlp))
        told = {name: 1 - ranks(pick(projected(out, x)), classes) / count
                for name, x in (("stream", kept.stream), *branches)}  # fmt: skip
        last = kept.stream[-1]
        given = {name: pick(out.linear(last, x) @ out.weight) for name, x in
                 (*branches, ("start", kept.stream[:1]))}  # fmt: skip
        own = {name: x.gather(-1, classes.expand(x.shape[:-1])[..., None])[..., 0]
               for name, x in given.items()}  # fmt: skip
        tick(0.8)
        memories = self.memories(subject)
        rows = [
            (layer, *(float(told[n][layer + (n == "stream")].double().mean()) for n in told),
             *(float(own[n][layer].mean()) for n in ("attention", "mlp")),
             *(float(memories[n][layer].max()) for n in ("attention", "mlp")))
            for layer in range(subject.layers)
        ]  # fmt: skip
        columns = ("layer", "identifiability", "of attention alone", "of MLP alone", "attention adds",
                   "MLP adds", "agreement of attention", "agreement of MLP")  # fmt: skip
        shares = torch.stack([self._by_head(subject, layer, parts, classes)
                              for layer, parts in enumerate(kept.heads)])  # fmt: skip
        return Findings(
            heads={"class logit": Scores(shares.double(), "what the head adds to the class's logit")},
            arrays={
                "identifiability": told["stream"], "logits": logits,
                "relevance": relevance(subject, kept, classes),
                **{f"{name} adds": x for name, x in given.items()},
            },
            tables=[Table("Classes by layer", columns, rows)],
        )  # fmt: skip

    @staticmethod
    def _by_head(subject: Subject, layer: int, parts: Tensor, classes: Tensor) -> Float[Tensor, " heads"]:
        """What each head of a layer adds to the logit of the class, over all tokens."""
        written = torch.einsum("rhtd,hdw->rhw", parts, head_weights(subject.model, layer).o)
        scale = pieces_of(subject.model, layer).attention_scale
        written = written if scale is None else written * scale
        return _logit(readout(subject.model), written, classes).mean(dim=0)

    @staticmethod
    def _picked(x: Tensor) -> Tensor:
        return x[..., 0, :]

    @staticmethod
    def _mean(x: Tensor) -> Tensor:
        return x.mean(dim=-2)

    def memories(self, subject: Subject) -> dict[str, Float[Tensor, "layers classes"]]:
        """How well the columns of each branch's last matrix agree with each class."""
        model, out = subject.model, readout(subject.model)
        found: dict[str, list[Tensor]] = {"attention": [], "mlp": []}
        for layer in range(subject.layers):
            pieces = pieces_of(model, layer)
            lasts = {"attention": output_projection(pieces.attention), "mlp": _last(pieces.mlp[-1])}
            for name, last in lasts.items():
                found[name].append(agreement(out.weight, matrix(last)[0]))
        return {name: torch.stack(each) for name, each in found.items()}


def _last(mlp: nn.Module) -> nn.Module:
    """The last matrix of an MLP."""
    names: tuple[str, ...] = ("down_proj", "fc2", "c_proj", "dense_4h_to_h")
    found: list[Any] = [getattr(mlp, name) for name in names if hasattr(mlp, name)]
    return found[0] if found else mlp
