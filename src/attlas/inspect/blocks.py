"""The pieces of a block, whatever a model calls them: its norms, its MLP, its branches' scales.

    before     x + s₁ ∘ attention(norm₁ x),   then   x + s₂ ∘ mlp(norm₂ x)        Llama, GPT-2, DINOv2
    behind     norm₁(x + attention(x)),       then   norm₂(x + mlp(x))            BERT
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from attlas.attach.stream import blocks, child
from attlas.errors import UserError

#: (norm before attention, norm before the MLP) of blocks that norm what their branches read.
_BEFORE = (
    ("attention_norm", "mlp_norm"), ("input_layernorm", "post_attention_layernorm"), ("ln_1", "ln_2"),
    ("norm1", "norm2"), ("layernorm_before", "layernorm_after"),
)  # fmt: skip
#: Norms of what a branch gives: a block that has them is of neither kind.
_SANDWICH = ("pre_feedforward_layernorm", "post_feedforward_layernorm", "post_mlp_layernorm")


@dataclass(frozen=True)
class BlockPieces:
    """One block.

    Attributes:
        attention: its attention.
        mlp: modules that follow one another, whose last adds nothing of the stream.
        attention_norm: in front of the attention, or behind the sum with it.
        mlp_norm: likewise.
        behind: whether the norms stand behind the sums.
        attention_scale: what the attention's output is multiplied by, [width]; None: nothing.
        mlp_scale: likewise.
    """

    attention: nn.Module
    mlp: tuple[nn.Module, ...]
    attention_norm: nn.Module
    mlp_norm: nn.Module
    behind: bool = False
    attention_scale: Tensor | None = None
    mlp_scale: Tensor | None = None


def pieces_of(model: nn.Module, layer: int) -> BlockPieces:
    """The pieces of one block of a model.

    Raises:
        ValueError: a layer that there is not, or a block whose pieces have no names that are known.
    """
    found = dict(blocks(model))
    if layer not in found:
        raise UserError(
            f"layer {layer} is none of {type(model).__name__}'s, whose layers are {sorted(found)}"
        )
    block = found[layer]
    attention, mlp = child(block, "attention"), child(block, "mlp")
    if attention is not None and _has(getattr(attention, "output", None), "LayerNorm"):
        return _behind(block, attention)
    names = next((pair for pair in _BEFORE if all(_has(block, name) for name in pair)), None)
    if names is None or attention is None or mlp is None or any(_has(block, n) for n in _SANDWICH):
        raise UserError(
            f"{type(block).__name__} is no block with a norm, an attention, a norm and an MLP whose "
            "names are known"
        )
    attention_norm, mlp_norm = (getattr(block, name) for name in names)
    scales = [getattr(getattr(block, f"layer_scale{i}", None), "lambda1", None) for i in (1, 2)]
    return BlockPieces(
        attention, (mlp,), attention_norm, mlp_norm,
        attention_scale=scales[0], mlp_scale=scales[1],
    )  # fmt: skip


def _behind(block: nn.Module, attention: nn.Module) -> BlockPieces:
    """The pieces of one of BERT's blocks."""
    inner, outer = getattr(block, "intermediate", None), getattr(block, "output", None)
    if not isinstance(inner, nn.Module) or not isinstance(outer, nn.Module):
        raise UserError(f"{type(block).__name__} has no MLP by a name that is known")
    norms: list[nn.Module] = [getattr(m, "LayerNorm") for m in (attention.output, outer)]  # noqa: B009
    return BlockPieces(
        attention, (inner, outer.get_submodule("dense")), norms[0], norms[1], behind=True
    )


def _has(module: nn.Module | None, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Module)
