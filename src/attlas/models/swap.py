"""swap: a mechanism in place of a pretrained model's self-attention, with the weights that fit.

    report = attlas.swap(model, "differential-transformer")     the model itself is changed
    print(report)                                               what is new and has to be trained

The model's rotary frequencies, with its scaling, go to the mechanism unless it brings positions of
its own; caches, padding and generation work as before.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attlas import masks
from attlas.attention import Attention
from attlas.catalog import registry
from attlas.catalog.kinds import LAYER
from attlas.hf.models import (
    ROPE_INIT_FUNCTIONS,
    PreTrainedModel,
)
from attlas.models.swapped import NormedLinear, Swapped, pass_padding
from attlas.positions import RoPE

#: Model types whose self-attention is Llama's, with biases, norms or windows at most.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
#: Rotary scalings whose frequencies never change.
FIXED = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class SwapReport:
    """What a swap has done.

    Attributes:
        mechanism: what the layers have now.
        new: for each changed layer the parameters that did not come from the model.
        total: for each changed layer how many parameters it has.
        own_position: whether the mechanism's positions replace the model's rotary ones.
    """

    mechanism: str
    new: Mapping[int, Sequence[str]]
    total: Mapping[int, int]
    own_position: bool

    def __str__(self) -> str:
        """A line for each set of layers that are alike."""
        alike: dict[tuple[str, ...], list[int]] = {}
        for layer, names in self.new.items():
            alike.setdefault(tuple(names), []).append(layer)
        lines = [f"{self.mechanism} in {len(self.new)} layers"]
        for names, layers in alike.items():
            what = f"new: {', '.join(names)}" if names else "all parameters kept"
            lines.append(f"  layers {_ranges(layers)}: {what}, of {self.total[layers[0]]}")
        if self.own_position:
            lines.append("  the model's rotary positions gave way to the mechanism's own")
        return "\n".join(lines)


def swap(
    model: PreTrainedModel, mechanism: str, layers: Sequence[int] | None = None, **options: object
) -> SwapReport:
    """Put a mechanism in place of a pretrained model's self-attention.

    The model is changed in place: copy it before if the old one is needed. What comes out can be
    trained and generates, but Transformers cannot load it by itself: load the old one, swap, and
    then load the state dict.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 with or without its head.
        mechanism: a registered layer with a causal form.
        layers: which to swap, counted from 0; all unless given.
        options: of its constructor.

    Returns:
        Which parameters are new in which layers.

    Raises:
        TypeError: another family of models.
        ValueError: an unknown mechanism, one without a causal form, a layer that there is not, or
            what does not fit; the model is then unchanged.
    """
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if not isinstance(model, PreTrainedModel) or family not in FAMILIES:
        raise TypeError(f"swap takes models of {list(FAMILIES)}, got {family!r}")
    entry = registry.find(mechanism)
    cls: Any = entry.object
    if entry.kind is not LAYER:
        raise ValueError(
            f"mechanism: {entry.name!r} is no layer but a registered {entry.kind.name}"
        )
    if not cls.supports.causal:
        raise ValueError(f"mechanism: {entry.name!r} has no causal form, so it cannot decode")
    body: Any = model.base_model
    count = len(body.layers)
    chosen = list(range(count)) if layers is None else list(dict.fromkeys(layers))
    for layer in chosen:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
            raise ValueError(f"layers must lie in 0..{count - 1}, got {layer!r}")
        if isinstance(body.layers[layer].self_attn, Swapped):
            raise ValueError(f"layers: layer {layer} is swapped already")
    made, new = {}, {}
    for layer in chosen:
        try:
            made[layer], new[layer] = _made(body, layer, entry.name, options)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{entry.name!r} in layer {layer}: {error}") from error
    for layer, attention in made.items():
        body.layers[layer].self_attn = Swapped(attention)
    if pass_padding not in body._forward_pre_hooks.values():
        body.register_forward_pre_hook(pass_padding, with_kwargs=True)
    total = {layer: len(list(attention.parameters())) for layer, attention in made.items()}
    return SwapReport(entry.name, new, total, not cls.supports.position)


def _made(
    body: Any, layer: int, name: str, options: Mapping[str, Any]
) -> tuple[Attention, list[str]]:
    """The layer's new attention, and the names of what is new in it."""
    old, config = body.layers[layer].self_attn, body.config
    heads, dim, width = config.num_attention_heads, config.hidden_size, old.head_dim
    given: dict[str, Any] = {"dim": dim, "heads": heads, "causal": True, "layer_idx": layer}
    if config.num_key_value_heads != heads:
        given["kv_heads"] = config.num_key_value_heads
    if heads * width != dim:
        given["head_dim"] = width
    if old.q_proj.bias is not None:
        given["bias"] = True
    if config.attention_dropout:
        given["dropout"] = config.attention_dropout
    # Mistral's layers have the model's window, Qwen's their own or none.
    mistral = config.sliding_window if config.model_type == "mistral" else None
    if (window := getattr(old, "sliding_window", mistral)) is not None:
        given["mask"] = masks.window(window)
    if registry.find(name).object.supports.position:  # type: ignore[attr-defined]
        given["position"] = "rope"
    attention: Attention = registry.make(name, **{**given, **options})
    rotary = "position" in given and "position" not in options
    if rotary and isinstance(attention.position_encoding, RoPE):
        attention.position_encoding = _rope(body, attention.head_dim)
    if old.o_proj.bias is None and isinstance(getattr(attention, "o_proj", None), nn.Linear):
        attention.o_proj.register_parameter("bias", None)
    attention.to(device=old.q_proj.weight.device, dtype=old.q_proj.weight.dtype)
    attention.train(old.training)
    new = attention.load_from({k: w for k, w in old.state_dict().items() if "_norm" not in k})
    for short in ("q", "k"):
        norm, plain = getattr(old, f"{short}_norm", None), getattr(attention, f"{short}_proj", None)
        if norm is None:
            continue
        if not isinstance(plain, nn.Linear) or plain.out_features % width:
            raise ValueError(f"{short}_norm of the model has no place here: heads of other widths")
        setattr(attention, f"{short}_proj", NormedLinear(plain, copy.deepcopy(norm), width))
    return attention, new


def _rope(body: Any, head_dim: int) -> RoPE:
    """The model's rotary positions for heads of a width that may not be the model's."""
    rotary, config = body.rotary_emb, copy.deepcopy(body.config)
    if rotary.rope_type not in FIXED:
        raise ValueError(f"rope_type {rotary.rope_type!r} of the model changes as texts grow")
    config.head_dim = head_dim
    made = (
        rotary.compute_default_rope_parameters if rotary.rope_type == "default"
        else ROPE_INIT_FUNCTIONS[rotary.rope_type]
    )  # fmt: skip
    with torch.device("cpu"):
        frequencies, magnitude = made(config)
    if 2 * len(frequencies) != head_dim:
        raise ValueError("partial_rotary_factor of the model cannot be honoured")
    rope = RoPE(head_dim)
    rope.frequencies, rope.magnitude = frequencies.float(), float(magnitude)
    return rope


def _ranges(layers: Sequence[int]) -> str:
    """0-2, 5."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and parts[-1][1] == layer - 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)
