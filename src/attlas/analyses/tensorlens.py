"""TensorLens: a whole model, on one text, as one linear operator on its embeddings.

    x_out = T x_in + t                       T: [tokens, width, tokens, width], of this text
    attention    Σ_h A_h (x W_V,h + b) W_O,h + b_O                       A_h as they were on the text
    norm         g ∘ (x − mean x) / s + c                                s as it was; RMSNorm: no mean
    activation   f(z) = (f(z)/z) ∘ z,    gated: f(z_gate) ∘ z_up         the diagonal as it was
    residual     the identity;  biases are what a constant coordinate is multiplied by

Everything that depends on the text is held, so that the rest is linear; T and t are what it makes of each
unit vector and of the constant. Maps of tokens [out, in] are made of T by the norms of its blocks, or by
contraction with the embeddings, ‖T_ij x_j‖, for which T is never made.

Cost: T takes tokens · width linear passes, contraction one for each token. With norms, MLPs and values
left out the operator is rollout: Π (mean_h A_h + I) / 2.

Source: "TensorLens: End-to-End Transformer Analysis via High-Order Attention Tensors".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attlas.attach import attach
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.inspect.blocks import BlockPieces, pieces_of
from attlas.inspect.readout import gained, last_norm, size_of
from attlas.inspect.subject import Subject
from attlas.inspect.weights import HeadWeights, head_weights, matrix
from attlas.kinds.analysis import Analysis, Findings
from attlas.models.blocks import MLP
from attlas.options import option
from attlas.parts.record.activations import Activations

#: Names of an MLP's matrices: the one that it begins with, the gated other, the one that it ends with.
_FIRST, _GATED = ("gate_proj", "fc1", "c_fc", "dense_h_to_4h", "dense"), "up_proj"
_LAST = ("down_proj", "fc2", "c_proj", "dense_4h_to_h")
_ACTIVATIONS = ("act_fn", "act", "activation_fn", "intermediate_act_fn")


class Norm:
    """A norm with the size that it divided by on the text."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def hold(self, x: Float[Tensor, "tokens width"]) -> Tensor:
        """What it makes of the text; its size is kept."""
        self.size = size_of(self.module, x)
        return self(x[None], torch.ones_like(x[:1, 0]))[0]

    def __call__(self, x: Tensor, constant: Tensor) -> Tensor:
        """The linear map; `constant` is each row's constant coordinate, which biases are times."""
        bias = getattr(self.module, "bias", None)
        y = gained(self.module, x) / self.size
        return y if bias is None else y + constant[:, None, None] * bias


class Mixing:
    """An attention with the weights that it had on the text."""

    def __init__(self, weights: HeadWeights, pattern: Float[Tensor, "heads tokens tokens"]) -> None:
        self.weights, self.pattern = weights, pattern

    def hold(self, x: Tensor) -> Tensor:
        """What it makes of the text."""
        return self(x[None], torch.ones_like(x[:1, 0]))[0]

    def __call__(self, x: Tensor, constant: Tensor) -> Tensor:
        """Σ_h A_h (x W_V,h + b) W_O,h + b_O."""
        w, one = self.weights, constant[:, None, None]
        v = torch.einsum("rtw,hwd->rhtd", x, w.v) + one[..., None] * w.v_bias[:, None]
        return torch.einsum("hqk,rhkd,hdw->rqw", self.pattern, v, w.o) + one * w.o_bias


class Feed:
    """An MLP with the diagonals that it had on the text."""

    def __init__(self, modules: tuple[nn.Module, ...]) -> None:
        inner = modules[0]
        self.first = matrix(_named(inner, _FIRST))
        self.up = matrix(getattr(inner, _GATED)) if hasattr(inner, _GATED) else None
        self.last = matrix(modules[1] if len(modules) > 1 else _named(inner, _LAST))
        named = (getattr(inner, name, None) for name in _ACTIVATIONS)
        found = next((f for f in named if callable(f)), None)
        if found is None and not isinstance(inner, MLP):
            raise UserError(f"{type(inner).__name__} has no activation by a name that is known")
        self.act: Callable[[Tensor], Tensor] = found or nn.functional.silu
        zero = self.last[0].new_zeros(1)
        if self.up is None and float(self.act(zero)) != 0:
            raise UserError(
                f"{type(inner).__name__}'s activation is not 0 at 0: f(z)/z has no value there"
            )

    def hold(self, x: Tensor) -> Tensor:
        """What it makes of the text; its diagonal is kept."""
        z = x @ self.first[0] + self.first[1]
        f = self.act(z)
        self.diagonal = f if self.up else torch.where(z == 0, 0.0, f / torch.where(z == 0, 1.0, z))
        return self(x[None], torch.ones_like(x[:1, 0]))[0]

    def __call__(self, x: Tensor, constant: Tensor) -> Tensor:
        """Both matrices with the diagonal between."""
        one = constant[:, None, None]
        w, b = self.up or self.first
        z = self.diagonal * (x @ w + one * b)
        return z @ self.last[0] + one * self.last[1]


def _named(module: nn.Module, names: tuple[str, ...]) -> nn.Module:
    found = (getattr(module, name, None) for name in names)
    one = next((m for m in found if isinstance(m, nn.Module)), None)
    if one is None:
        raise UserError(f"{type(module).__name__} has no matrix called one of {', '.join(names)}")
    return one


@dataclass(frozen=True)
class Lens:
    """A model on one text, linear.

    Attributes:
        embeddings: what its first block is given.
        output: what it gives, behind its last norm.
        steps: of every block in order, each with whether it is added to the stream, and its scale.
        ends: how many steps there are behind each block; the last norm is one more.
    """

    embeddings: Float[Tensor, "tokens width"]
    output: Float[Tensor, "tokens width"]
    steps: tuple[tuple[tuple[Any, ...], bool, Tensor | None], ...]
    ends: tuple[int, ...]

    def __call__(
        self,
        x: Float[Tensor, "rows tokens width"],
        constant: Float[Tensor, " rows"],
        until: int | None = None,
    ) -> Float[Tensor, "rows tokens width"]:
        """The linear map of some embeddings and their constant coordinate, through some of its steps."""
        for maps, added, scale in self.steps[:until]:
            y = x
            for one in maps:
                y = one(y, constant)
            y = y if scale is None else y * scale
            x = x + y if added else y
        return x

    def tensor(self) -> tuple[Float[Tensor, "tokens width tokens width"], Float[Tensor, "tokens width"]]:
        """(T, t), made whole."""
        length, width = self.embeddings.shape
        units = torch.eye(length * width).to(self.embeddings).unflatten(1, (length, width))
        columns = self(units, units.new_zeros(len(units)))
        shift = self(torch.zeros_like(units[:1]), units.new_ones(1))[0]
        return columns.unflatten(0, (length, width)).permute(2, 3, 0, 1), shift

    def pieces(self, until: int | None = None) -> Float[Tensor, "tokens_out tokens_in width"]:
        """T_ij x_j: what each token's embedding gives of each output, without T."""
        length, _ = self.embeddings.shape
        alone = torch.eye(length).to(self.embeddings)[..., None] * self.embeddings
        return self(alone, alone.new_zeros(length), until).transpose(0, 1)

    def reduced(
        self, how: Literal["norm", "input"] = "input", until: int | None = None
    ) -> Float[Tensor, "tokens_out tokens_in"]:
        """A map of tokens: "input" ‖T_ij x_j‖, "norm" the Frobenius norm of each block T_ij."""
        if how == "input":
            lengths: Tensor = torch.linalg.vector_norm(self.pieces(until), dim=-1)
            return lengths
        return self.tensor()[0].square().sum(dim=(1, 3)).sqrt()


def lens(
    model: nn.Module,
    embeddings: Float[Tensor, "tokens width"],
    patterns: Float[Tensor, "layers heads tokens tokens"],
) -> Lens:
    """The linear model, given what its first block reads and the attention weights of a run.

    Raises:
        ValueError: a model with pieces that are not known.
    """
    x, steps, ends = embeddings, list[Any](), list[int]()

    def add(maps: tuple[Any, ...], added: bool, scale: Tensor | None = None) -> None:
        nonlocal x
        y = x
        for one in maps:
            y = one.hold(y)
        y = y if scale is None else y * scale
        x = x + y if added else y
        steps.append((maps, added, scale))

    for layer, pattern in enumerate(patterns):
        block: BlockPieces = pieces_of(model, layer)
        mix, feed = Mixing(head_weights(model, layer), pattern), Feed(block.mlp)
        norms = Norm(block.attention_norm), Norm(block.mlp_norm)
        for norm, branch, scale in zip(
            norms, (mix, feed), (block.attention_scale, block.mlp_scale), strict=True
        ):
            if block.behind:
                add((branch,), True, scale)
                add((norm,), False)
            else:
                add((norm, branch), True, scale)
        ends.append(len(steps))
    final = last_norm(model)
    if final is not None:
        add((Norm(final),), False)
    return Lens(embeddings, x, tuple(steps), tuple(ends))


def attention_only(
    patterns: Float[Tensor, "layers heads tokens tokens"],
) -> Float[Tensor, "tokens tokens"]:
    """The operator with values, norms and MLPs left out, blocks halved: rollout."""
    eye = torch.eye(patterns.shape[-1]).to(patterns)
    halved = [(p.mean(dim=0) + eye) / 2 for p in patterns.flip(0)]
    mixed: Tensor = torch.linalg.multi_dot([eye, *halved, eye])
    return mixed


@mechanism("tensorlens", paper="tensorlens")
class TensorLens(Analysis):
    """How much of each token's output each token's embedding makes, through all of the model."""

    needs = "text"
    inspects = "flow"

    most: int = option(
        "tokens of a text that are taken; longer ones are refused", default=256, at_least=1
    )

    def check(self, subject: Subject) -> None:
        """Refuse texts that are too long, and models whose pieces are not known."""
        longest = int(subject.valid.sum(dim=1).max())
        if longest > self.most:
            raise UserError(
                f"tensorlens takes a linear pass for each of the {longest} tokens, and most={self.most}; "
                "give a shorter text, or raise it"
            )
        for layer in range(subject.layers):
            head_weights(subject.model, layer)
            Feed(pieces_of(subject.model, layer).mlp)

    def run(self, subject: Subject, tick: Callable[[float], None]) -> Findings:
        """The map of tokens behind each block, and behind the whole model, of each text."""
        made = self.lenses(subject)
        tick(0.5)
        first = made[0]
        flow = torch.stack([first.reduced("input", until) for until in first.ends])
        whole = first.reduced("input")
        tick(1.0)
        linear = [x(x.embeddings[None], x.embeddings.new_ones(1))[0] for x in made]
        gap = max(
            float((ours - x.output).abs().max()) for ours, x in zip(linear, made, strict=True)
        )
        return Findings(
            arrays={"flow": flow / flow.sum(dim=-1, keepdim=True), "map": whole},
            says=[f"The linear operator gives the model's own output to {gap:.1e}."],
        )

    def lenses(self, subject: Subject) -> list[Lens]:
        """One of each text, padding left out."""
        recorder = Activations(("residual",), layers=[0])
        with attach(subject.model, record=[recorder, "weights"], compile=False) as session:
            subject.forward()
            patterns = session["weights"]
        embeddings, valid = recorder.result()["residual"][0], subject.valid
        return [_of_row(subject.model, embeddings[row], patterns[:, row], valid[row])
                for row in range(len(valid))]  # fmt: skip


def _of_row(model: nn.Module, x: Tensor, patterns: Tensor, valid: Bool[Tensor, " tokens"]) -> Lens:
    return lens(model, x[valid], patterns[..., valid, :][..., valid].to(x.dtype))
