"""The way from the residual stream to the logits, as a linear map on a run: direct logit attribution.

    logits = W_U · norm(x) + b,   norm(x) = g ∘ (x − mean x) / s(x) + c        RMSNorm: no mean, no c

With s taken from the run, norm is linear in what was added to x, so that the logits are the sum of what
each head, each MLP and the embedding gives, and of constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.errors import UserError
from attlas.inspect.weights import matrix

#: Names of a model's last norm.
_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "layernorm", "final_norm")


@dataclass(frozen=True)
class Readout:
    """The last norm and what reads logits from behind it.

    Attributes:
        norm: the module.
        weight: W_U, [width, logits].
        bias: of the logits.
    """

    norm: nn.Module
    weight: Float[Tensor, "width logits"]
    bias: Float[Tensor, " logits"]

    def linear(
        self, total: Float[Tensor, "*rows width"], piece: Float[Tensor, "*more width"]
    ) -> Float[Tensor, "*all width"]:
        """What a piece of `total` becomes behind the norm, its constants left out; pieces add up."""
        return linearised(self.norm, total, piece)

    @property
    def offset(self) -> Float[Tensor, " logits"]:
        """What the logits have whatever the stream holds."""
        bias = getattr(self.norm, "bias", None)
        return self.bias if bias is None else bias @ self.weight + self.bias


def readout(model: nn.Module) -> Readout:
    """The last norm of a model, and its unembedding or classifier.

    Raises:
        ValueError: a model whose last norm or head is not known.
    """
    whole: Any = model
    norm = last_norm(model)
    head = whole.get_output_embeddings() if hasattr(whole, "get_output_embeddings") else None
    head = getattr(whole, "classifier", None) if head is None else head
    if norm is None or head is None:
        what = "last norm" if norm is None else "head that gives logits"
        raise UserError(f"{type(model).__name__} has no {what} by a name that is known")
    return Readout(norm, *matrix(head))


def last_norm(model: nn.Module) -> nn.Module | None:
    """The norm behind a model's last block, None where none is known."""
    whole: Any = model
    base = getattr(whole, "base_model", whole)
    inside = (base, getattr(base, "decoder", None))
    found = (getattr(part, name, None) for part in inside for name in _NORMS)
    return next((n for n in found if isinstance(n, nn.Module)), None)


def linearised(norm: nn.Module, total: Tensor, piece: Tensor) -> Tensor:
    """What a norm makes of a piece of its input, with the size that the whole input has.

    Raises:
        ValueError: a norm that is neither a layer norm nor a root-mean-square norm.
    """
    gain, part = gain_of(norm), normalised(norm, total, piece)
    return part if gain is None else (part * gain).to(piece.dtype)


def normalised(norm: nn.Module, total: Tensor, piece: Tensor) -> Tensor:
    """The same without the norm's gain."""
    x = total.to(torch.promote_types(total.dtype, torch.float32))
    return (_centred(norm, piece.to(x.dtype)) / size_of(norm, x)).to(piece.dtype)


def size_of(norm: nn.Module, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows 1"]:
    """What a norm divides its input by.

    Raises:
        ValueError: a norm that is neither a layer norm nor a root-mean-square norm.
    """
    _check_norm(norm)
    if isinstance(norm, nn.LayerNorm):
        return (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    eps = next((getattr(norm, n) for n in ("variance_epsilon", "eps") if hasattr(norm, n)), None)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return (x.square().mean(-1, keepdim=True) + eps).sqrt()


def gain_of(norm: nn.Module) -> Tensor | None:
    """What a norm multiplies by, Gemma's one included; None without."""
    gain: Tensor | None = getattr(norm, "weight", None)
    return 1.0 + gain if gain is not None and "Gemma" in type(norm).__name__ else gain


def gained(norm: nn.Module, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    """What a norm makes of x but for the size that it divides by, and for a bias.

    Raises:
        ValueError: a norm that is neither a layer norm nor a root-mean-square norm.
    """
    gain, x = gain_of(norm), _centred(norm, x)
    return x if gain is None else x * gain.to(x.dtype)


def _centred(norm: nn.Module, x: Tensor) -> Tensor:
    """x less its mean, where the norm takes it out."""
    _check_norm(norm)
    return x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x


def _check_norm(norm: nn.Module) -> None:
    """Refuse what is neither a layer norm nor a root-mean-square norm."""
    if not isinstance(norm, nn.LayerNorm) and "RMSNorm" not in type(norm).__name__:
        raise UserError(f"{type(norm).__name__} is no layer norm or root-mean-square norm")
