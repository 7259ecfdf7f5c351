"""The weights of a head: its own slices of the projections, whatever a model calls them.

    q_h = x W_Q,h + b_Q,h    k_h = x W_K,g(h) + b_K,g(h)    v_h = x W_V,g(h) + b_V,g(h)
    attention adds Σ_h z_h W_O,h + b_O                        z_h = Σ_j A_h,ij v_h,j

x is what the layer's attention is given, behind the norm; g(h) is the key head that serves query head h.
Rotation and norms of queries and keys are not in these weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from attlas.attach.stream import blocks, child
from attlas.errors import UserError
from attlas.hf.models import Conv1D

#: Names of the projections of q, k and v; of one that gives all three, side by side; of the output.
_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"))
_FUSED = ("c_attn", "qkv_proj", "query_key_value")
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense")


@dataclass(frozen=True)
class HeadWeights:
    """The weights of one layer's heads.

    Attributes:
        q: W_Q of each query head.
        k: W_K of the key head that serves it.
        v: W_V likewise.
        o: W_O of each query head.
        q_bias: zeros where there is none.
        k_bias: likewise.
        v_bias: likewise.
        o_bias: of all heads together.
    """

    q: Float[Tensor, "heads width dim"]
    k: Float[Tensor, "heads width dim"]
    v: Float[Tensor, "heads width value_dim"]
    o: Float[Tensor, "heads value_dim out_width"]
    q_bias: Float[Tensor, "heads dim"]
    k_bias: Float[Tensor, "heads dim"]
    v_bias: Float[Tensor, "heads value_dim"]
    o_bias: Float[Tensor, " out_width"]


def head_weights(model: nn.Module, layer: int) -> HeadWeights:
    """The weights of the heads of a layer.

    Args:
        model: a Transformers model or one of attlas's own, whatever its projections are called.
        layer: its number.

    Raises:
        ValueError: a layer that there is not, or projections that are not those of plain heads.
    """
    module, heads, kv_heads = attention_of(model, layer)
    counts = (heads, kv_heads, kv_heads)
    pieces = zip(_projections(module, heads, kv_heads), counts, strict=True)
    (wq, bq), (wk, bk), (wv, bv) = (_by_head(*piece, count, heads) for piece, count in pieces)
    weight, bias = matrix(output_projection(module))
    if weight.shape[0] != heads * wv.shape[-1] or wq.shape[-1] != wk.shape[-1]:
        raise UserError(
            f"{type(module).__name__} makes heads {wq.shape[-1]}, {wk.shape[-1]} and {wv.shape[-1]} wide "
            f"and takes {weight.shape[0]} back, so that its weights are not those of plain heads"
        )
    return HeadWeights(wq, wk, wv, weight.unflatten(0, (heads, -1)), bq, bk, bv, bias)


def attention_of(model: nn.Module, layer: int) -> tuple[nn.Module, int, int]:
    """(the attention of a layer's block, its query heads, its key heads).

    Raises:
        ValueError: a layer that there is not.
    """
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    modules = {number: child(block, "attention") for number, block in blocks(model)}
    found = {number: module for number, module in modules.items() if module is not None}
    if layer not in found:
        raise UserError(
            f"layer {layer} is none of {type(model).__name__}'s, whose layers are {sorted(found)}"
        )
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return found[layer], heads, kv_heads


def output_projection(module: nn.Module) -> nn.Module:
    """The projection that takes the heads of an attention back into the stream.

    Raises:
        ValueError: none is known.
    """
    named = list(module.named_modules())
    for name in _OUTPUTS:
        for path, found in named:
            if path.rpartition(".")[2] == name:
                return found  # type: ignore[no-any-return]
    raise UserError(
        f"{type(module).__name__} has no output projection called one of {', '.join(_OUTPUTS)}"
    )


def matrix(
    linear: nn.Module,
) -> tuple[Float[Tensor, "inputs outputs"], Float[Tensor, " outputs"]]:
    """(W, b) with y = x W + b, of a linear module or one of GPT-2's; zeros for a bias that is not there.

    Raises:
        ValueError: a module that is not linear.
    """
    if not isinstance(linear, nn.Linear | Conv1D):
        raise UserError(f"{type(linear).__name__} is no plain linear module, whose weights could be read")
    weight = linear.weight if isinstance(linear, Conv1D) else linear.weight.T
    bias: Tensor | None = linear.bias
    return weight, weight.new_zeros(weight.shape[1]) if bias is None else bias


def _projections(
    module: nn.Module, heads: int, kv_heads: int
) -> list[tuple[Tensor, Tensor]]:
    """(W, b) of q, k and v."""
    for inner in module.modules():
        for names in _SEPARATE:
            if all(isinstance(getattr(inner, n, None), nn.Module) for n in names):
                return [matrix(getattr(inner, n)) for n in names]
        for name in _FUSED:
            fused = getattr(inner, name, None)
            if isinstance(fused, nn.Module):
                return _parted(*matrix(fused), heads, kv_heads, name)
    raise UserError(f"{type(module).__name__} has no projections whose names are known")


def _parted(
    weight: Tensor, bias: Tensor, heads: int, kv_heads: int, name: str
) -> list[tuple[Tensor, Tensor]]:
    """(W, b) of q, k and v out of one projection."""
    if name == "query_key_value":  # of GPT-NeoX: each head's three side by side
        if weight.shape[1] % (3 * heads) or kv_heads != heads:
            raise UserError("query_key_value holds grouped heads in an order that is not known")
        w = weight.unflatten(1, (heads, 3, -1))
        b = bias.unflatten(0, (heads, 3, -1))
        return [(w[:, :, i].flatten(1), b[:, i].flatten()) for i in range(3)]
    dim = weight.shape[1] // (heads + 2 * kv_heads)
    sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
    return list(zip(weight.split(sizes, dim=1), bias.split(sizes), strict=True))


def _by_head(weight: Tensor, bias: Tensor, count: int, heads: int) -> tuple[Tensor, Tensor]:
    """([heads, width, dim], [heads, dim]) of `count` heads, repeated for the query heads they serve."""
    w = weight.unflatten(1, (count, -1)).transpose(0, 1)
    b = bias.unflatten(0, (count, -1))
    groups = heads // count
    return w.repeat_interleave(groups, dim=0), b.repeat_interleave(groups, dim=0)
