"""attlas's own layers through the same door: decoders, encoders and pictures made of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attlas import masks, ops
from attlas.attach.call import Call
from attlas.attach.forward import attended, show
from attlas.attach.part import Part, Recorder
from attlas.attach.state import ATTACHED, Attachment
from attlas.attach.under import recording
from attlas.attention import Attention
from attlas.errors import UserError
from attlas.inputs import Inputs
from attlas.masks import Mask

#: Hooks that need the layer's scores and keys to be those of softmax attention.
SOFTMAX_HOOKS = (
    "position", "values", "score_mod", "mask", "normalize", "select", "attend", "observe",
    "cache_layers",
)  # fmt: skip


class Door:
    """Takes the attention of one of our layers while its model is attached to.

    A copy of the layer that is made or saved meanwhile has none.
    """

    def __init__(self, layer: Attention) -> None:
        self.layer = layer

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied, ()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """The layer's heads [batch, heads, queries, width]."""
        layer, held = self.layer, ATTACHED[self.layer]
        if recording():
            return _recorded(held, layer, q, k, v, inputs)
        inputs = replace(inputs, pairs=layer.mask(q, _all_keys(k, inputs), inputs))
        if held.direct:
            return layer.attend(q, k, v, inputs)
        if is_softmax(layer):
            return _softmax(held, layer, q, k, v, inputs)
        return _other(held, layer, q, k, v, inputs)


def _recorded(
    held: Attachment, layer: Attention, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs
) -> Tensor:  # fmt: skip
    """The heads of a step's one token in a recorded step: over the keys that lie there, or by a state."""
    if not layer.keeps_keys:
        return layer.attend(q, k, v, inputs)
    if _reads_room(held, layer):
        return layer.attend(q, k, v, _of_room(held, layer, inputs))
    if _sees_some(layer):
        raise UserError(f"{type(layer).__name__} sees a pattern of the keys, and parts look at them")
    return _softmax(held, layer, q, k, v, inputs)


def _sees_some(layer: Attention) -> bool:
    return layer.pattern not in (None, masks.causal)


def _of_room(held: Attachment, layer: Attention, inputs: Inputs) -> Inputs:
    """The inputs of a recorded step for all the room of its keys, of which some hold nothing yet."""
    assert held.forward_pass is not None
    twin = held.forward_pass.cache.layers[layer.layer_idx]
    there = twin.filled()
    there = ops.repeated(there, layer.heads) if twin.ragged else there[:, :1]
    pairs = there[:, :, None]
    if layer.pattern is not None and _sees_some(layer):
        if layer.pattern.leaves:
            raise UserError(f"{type(layer).__name__} sees a pattern that tensors tell")
        pairs = pairs & masks.at(layer.pattern, inputs.positions, twin.places())
    return replace(inputs, pairs=pairs)


def unrecordable(layers: list[Attention]) -> str | None:
    """Which of these layers cannot be part of a recorded step, and why; None where all may be.

    Such a step holds more keys than there are, and hides those to come. That this changes nothing the
    contract tries with every layer of ours; a class of a user's must say so, by `roomy = True`. So must
    one with a `mask` stage of its own, for which its `pattern` stands here.
    """
    for layer in layers:
        name = f"{type(layer).__name__} in layer {layer.layer_idx}"
        if not layer.causal:
            return f"{name} is not causal"
        kind = type(layer)
        changed = not is_softmax(layer) or kind.features is not Attention.features
        if layer.keeps_keys and changed and not roomy(kind):
            return f"{name} does not say that it is roomy"
        if layer.keeps_keys and kind.mask is not Attention.mask and not getattr(kind, "roomy", False):
            return f"{name} makes a mask of its own, and does not say that it is roomy"
    return None


def roomy(kind: type[Attention]) -> bool:
    """Whether hidden keys behind the newest change nothing of what a layer of this class gives."""
    return bool(getattr(kind, "roomy", kind.__module__.startswith("attlas.")))


def reading_rooms(held: Attachment) -> set[int]:
    """Numbers of the layers that are given all the room of their keys in a recorded step."""
    own = [m for m in held.tower.layers if isinstance(m, Attention) and m.keeps_keys]
    return {layer.layer_idx for layer in own if _reads_room(held, layer)}


def _reads_room(held: Attachment, layer: Attention) -> bool:
    """Whether a layer reads keys in a way of its own, or sees or weighs them by position where no part
    looks at them, too."""
    by_position = layer.score_mod is not None or _sees_some(layer)
    return not is_softmax(layer) or (by_position and not held.parts)


def _copied() -> None:
    """What a door is on a copy."""


def own_layers(model: nn.Module) -> list[Attention]:
    """The layers of ours that are attached to: all, or a decoder's own behind an encoder."""
    found = [m for m in model.modules() if isinstance(m, Attention)]
    both_sides = getattr(model.config, "is_encoder_decoder", False)
    return [layer for layer in found if layer.causal] or found if both_sides else found


def is_softmax(layer: Attention) -> bool:
    """Whether a layer attends as `Attention` does, so that its keys and scores may be worked on."""
    cls, base = type(layer), Attention
    kept = (*base.MIDDLE, "attend", "fused", "restore")
    return layer.keeps_keys and all(getattr(cls, n) is getattr(base, n) for n in kept)


def check(layers: list[Attention], parts: tuple[Part, ...]) -> None:
    """Refuse parts that need more of a layer than it has.

    Raises:
        ValueError: by the part's and the layer's name.
    """
    for layer in layers:
        if is_softmax(layer):
            continue
        for part in parts:
            changed = [h for h in SOFTMAX_HOOKS if getattr(type(part), h) is not getattr(Part, h)]
            changed += ["wants_gradients"] if part.wants_gradients else []
            if changed and part.where.covers(layer.layer_idx):
                raise UserError(
                    f"{type(part).__name__} works on softmax attention ({changed[0]}), and layer "
                    f"{layer.layer_idx} is {type(layer).__name__}, which makes its outputs in another "
                    "way; recorders of weights and changes of outputs work on it"
                )


def _all_keys(k: Tensor, inputs: Inputs) -> Tensor:
    """k, or where a cache holds fewer slots than it has seen something of the length of all."""
    if inputs.cache is None:
        return k
    seen = int(inputs.cache.get_seq_length(inputs.layer_idx))
    if seen == k.shape[2]:
        return k
    return k[:, :, :1].expand(-1, -1, seen, -1)


def _softmax(
    held: Attachment, layer: Attention, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs
) -> Tensor:  # fmt: skip
    mask = inputs.pairs
    keys = k.shape[2] if recording() else _all_keys(k, inputs).shape[2]
    one = q.shape[2] == 1
    causal = mask == masks.causal if isinstance(mask, Mask) else False
    pairs: Tensor | None = None
    if not (mask is None or causal):
        offset = keys - q.shape[2]
        pairs = ops.as_dense(mask, q.shape[2], keys, offset, q.device)
        pairs = None if pairs is None else pairs.expand(q.shape[0], -1, q.shape[2], keys)
    options = {"is_causal": causal, "score_mod": inputs.by_positions(layer.score_mod, keys)}
    if one and layer.causal:  # a single token sees all that is there: the cache may keep its form
        options["is_causal"] = True
    changed = type(layer).features is not Attention.features
    told = _of_room(held, layer, inputs) if changed and recording() else inputs
    heads = attended(
        held, held.at(layer), layer, q, k, v, pairs, layer.scale,
        layer.dropout if layer.training else 0.0, options,
        (lambda q, k: layer.features(q, k, told)) if changed else None,
    )  # fmt: skip
    return heads.transpose(1, 2)


def _other(
    held: Attachment, layer: Attention, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs
) -> Tensor:  # fmt: skip
    """A layer with a way of its own: its heads, and its map for those who record weights."""
    at = held.at(layer)
    assert at is not None  # a layer of ours with a door is always one of the session's
    number, forward_pass = at
    call = Call(number, layer, q, k, v, layer.scale, None, forward_pass, is_causal=layer.causal)
    recorders: list[Recorder] = [] if held.again else held.recorders_of(number)
    if recorders:
        # Before any token was kept the map is that of a pass without a cache.
        alone = replace(inputs, cache=None) if forward_pass.offset == 0 else inputs
        weights = layer.weigh(q, k, alone).detach().float()
        if (valid := call.valid) is not None:
            weights = weights * valid[:, None, :, None]
        keys = torch.arange(weights.shape[-1], device=weights.device)
        for recorder in recorders:
            show(recorder, call, weights, call.queries, keys)
    heads = layer.attend(q, k, v, inputs).transpose(1, 2)
    for part in held.with_hook("output", number):
        heads = part.output(call, heads)
    return heads.transpose(1, 2)
