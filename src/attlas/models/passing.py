"""One pass through a stack of blocks, and what is given beside its result when it is asked for.

    h, map = attention(norm h)        output_attentions: the map that each layer's output is summed with
    h_0 … h_n                         output_hidden_states: what goes into each block, and the normed end
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attlas.attention import Attention
from attlas.errors import UserError
from attlas.hf.caches import Cache
from attlas.models.packing import Packing

#: What Transformers hands to every model, and models without use for it pass over.
PASSED_OVER = ("return_dict", "num_items_in_batch", "cache_position")
#: Bounds of packed texts, which the positions tell too.
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclass(frozen=True)
class Passed:
    """What came of a pass: the result, and, where they were asked for, states and maps by layer."""

    last: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
    cross_attentions: tuple[Tensor, ...] | None


def through(
    layers: Iterable[nn.Module], norm: nn.Module, h: Tensor, context: Tensor | None = None, *,
    states: bool, maps: bool, **given: Any,
) -> Passed:  # fmt: skip
    """Pass h through blocks and the last norm.

    Args:
        layers: the blocks.
        norm: behind the last of them.
        h: the embedded tokens.
        context: what cross-attention attends to.
        states: whether hidden states are wanted.
        maps: whether attention maps are.
        given: what every block is called with.

    Raises:
        ValueError: maps of layers that have none, or with a cache that tells them no more.
    """
    blocks: Sequence[Any] = list(layers)
    if maps:
        check_maps(blocks, given.get("cache"))
        given["maps"] = True
    kept: list[Tensor] = []
    own: list[Tensor] = []
    cross: list[Tensor] = []
    for block in blocks:
        if states:
            kept.append(h)
        # Gradients flow through positional arguments alone where checkpointing is reentrant.
        out = block(h, context, **given) if context is not None else block(h, **given)
        if maps:
            h, own_map, cross_map = out
            own.append(own_map)
            cross.extend(() if cross_map is None else (cross_map,))
        else:
            h = out
    h = norm(h)
    return Passed(
        h, (*kept, h) if states else None, tuple(own) if maps else None, tuple(cross) or None
    )


def attended(
    layer: Any, x: Tensor, packing: Packing | None, maps: bool, **given: Any
) -> tuple[Tensor, Tensor | None]:
    """(what a layer gives, its map if that is wanted), each packed text by itself."""
    batch = x.shape[0]
    if packing is not None:
        x = packing.apart(x)
        given |= {"mask": packing.valid, "positions": packing.positions}
    y, weights = with_map(layer, x, **given) if maps else (layer(x, **given), None)
    if packing is None:
        return y, weights
    return packing.joined(y, batch), None if weights is None else packing.joined_maps(weights, batch)


def with_map(
    layer: Attention, x: Tensor, context: Tensor | None = None, **given: Any
) -> tuple[Tensor, Tensor]:
    """(what a layer gives, the map of its weights), in one pass."""
    q, k, v, inputs = layer.prepare(x, context, **given)
    # What earlier passes have left is not taken in twice.
    weights = layer.weigh(q, k, replace(inputs, cache=None))
    plain = type(layer).attend is Attention.attend
    heads = layer.aggregate(weights, v, inputs) if plain else layer.attend(q, k, v, inputs)
    return layer.output(heads, inputs), weights


def check_maps(blocks: Iterable[nn.Module], cache: Cache | None) -> None:
    """Refuse to tell maps where there are none.

    Raises:
        ValueError: a layer without a map; one that remembers more than keys, with a cache that has taken
            in tokens; a layer that is attached to.
    """
    seen = 0 if cache is None else int(cache.get_seq_length())
    for block in blocks:
        for layer in block.modules():
            if not isinstance(layer, Attention):
                continue
            name, number = type(layer).__name__, layer.layer_idx
            if not layer.supports.maps:
                raise UserError(
                    f"output_attentions: {name} in layer {number} has no attention map; leave it out"
                )
            if seen and not layer.supports.takes_back:
                raise UserError(
                    f"output_attentions: {name} in layer {number} cannot tell the weights of the "
                    f"{seen} tokens that its cache has taken in; give the whole text, use_cache=False"
                )
            if layer.door is not None:
                raise UserError(
                    "output_attentions: a part is attached to the model, which attends in its layers' "
                    "place; ask for maps outside of the block"
                )


def asked(config: Any, name: str, given: bool | None) -> bool:
    """Whether an output is wanted; as the configuration says unless given."""
    return bool(getattr(config, name, False) if given is None else given)


def check_rest(model: nn.Module, rest: Mapping[str, Any], positions: Tensor | None = None) -> None:
    """Refuse arguments that a model has no use for, besides what Transformers hands to all.

    Raises:
        TypeError: naming the argument.
    """
    for name, value in rest.items():
        if value is None or value is False or name in PASSED_OVER:
            continue
        if name in BOUNDS and positions is not None:
            continue
        if name == "token_type_ids" and not torch.compiler.is_compiling() and not bool(value.any()):
            continue
        hint = {
            "token_type_ids": "; a pair of sentences has to be told apart by a token between them",
            **dict.fromkeys(BOUNDS, "; give position_ids, which begin anew with each text"),
        }.get(name, "")
        raise TypeError(f"{type(model).__name__} takes no {name!r}{hint}")


def check_mask(mask: Tensor | None, tokens: Tensor, cache: Cache | None = None) -> None:
    """Refuse a mask of padding that is not as long as the tokens, whatever it holds.

    Raises:
        ValueError: with the shape that it must have.
    """
    if mask is None or mask.ndim != 2:
        return
    seen = 0 if cache is None else cache.get_seq_length()
    wanted = (tokens.shape[0], seen + tokens.shape[1])
    if not isinstance(seen, Tensor) and tuple(mask.shape) != wanted:
        raise UserError(
            f"attention_mask must be [batch, tokens, cached ones included] = {list(wanted)}, "
            f"got {list(mask.shape)}"
        )
