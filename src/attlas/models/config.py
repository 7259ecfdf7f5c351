"""What all models share in their configurations: which attention each layer has, and its options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from attlas import masks
from attlas.attention import Attention
from attlas.catalog import registry
from attlas.catalog.kinds import LAYER
from attlas.errors import at_least_one
from attlas.hf.models import PretrainedConfig, mark_initialized
from attlas.positions import Learned, RoPE, T5Bias

#: Masks that stand for softmax attention with them.
MASKS: dict[str, Any] = {
    name: getattr(masks, name) for name in ("bigbird", "dilated", "strided", "window")
}
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")

#: Sizes that are each mechanism's own unless given: their name here, and that of its option.
OWN = {"num_key_value_heads": "kv_heads", "head_dim": "head_dim"}


class TypedConfig(PretrainedConfig):  # type: ignore[misc]
    """A configuration that no other type of model's checkpoint is read as; its `attention` is named."""

    attention: Any

    def __init_subclass__(cls, *args: Any, **kwargs: Any) -> None:
        super().__init_subclass__(*args, **kwargs)
        # Transformers' __init__ takes more keywords than the one it wraps: its own signature says so.
        vars(cls)["__init__"].__dict__.pop("__wrapped__", None)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration that a checkpoint holds.

        Raises:
            ValueError: it is of another type of model.
        """
        found = config_dict.get("model_type")
        if found not in (None, cls.model_type):
            raise ValueError(f"model_type of the checkpoint is {found!r}, not {cls.model_type!r}")
        return super().from_dict(config_dict, **kwargs)


class AttlasConfig(TypedConfig):
    """Sizes and attention.

    Args:
        hidden_size: width of the residual stream.
        num_hidden_layers: blocks.
        num_attention_heads: query heads of every layer.
        num_key_value_heads: key and value heads; unless given, each layer has its mechanism's, and
            this tells those of the first.
        head_dim: width of a head, likewise.
        intermediate_size: width of the MLP; 8/3 of `hidden_size`, rounded up to a multiple of 8.
        attention: a registered layer, one of MASKS, {"name": ..., **options}, or a list of these that is
            repeated over the layers. A mask stands for softmax attention with it.
        attention_options: options for all layers that take them.
        sliding_window: tokens that a "window" layer sees.
        position: "auto" (rotary, or the mechanism's own), or none, learned, sinusoidal, rope, alibi, t5.
        rope_theta: base of the rotary wavelengths.
        max_position_embeddings: positions that `learned` has room for.
        rms_norm_eps: of the norms.
        attention_bias: whether the projections of attention have one.
        attention_dropout: share of weights dropped while training.
        initializer_range: standard deviation of the embeddings and linear layers outside attention.

    Raises:
        ValueError: an unknown name, a pattern that does not divide the layers, an option that no
            layer takes or that JSON cannot hold.
    """

    #: Besides `attention`, fields that say which attention a layer has somewhere; None for the same.
    places: ClassVar[tuple[str, ...]] = ()

    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    attention: Any = "softmax"
    attention_options: dict[str, Any] | None = None
    sliding_window: int | None = None
    position: str = "auto"
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    layer_types: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in SIZES:
            at_least_one(name, getattr(self, name))
        if self.intermediate_size is None:
            self.intermediate_size = -(-self.hidden_size * 8 // 3 // 8) * 8
        self.attention_options = dict(self.attention_options or {})
        for name in ("attention", "attention_options", *self.places):
            try:
                json.dumps(getattr(self, name))
            except TypeError as error:
                raise ValueError(f"{name} must hold what JSON can: {error}") from error
        known = [
            set(_takes(*self.choice(layer, where)[:2]))
            for where in ("attention", *self.places)
            for layer in range(self.num_hidden_layers)
        ]
        for option in self.attention_options:
            if not any(option in one for one in known):
                raise ValueError(
                    f"attention_options: no layer of {self.attention!r} takes {option!r}"
                )
        # What a Transformers cache keeps of each layer.
        self.layer_types = [self._layer_type(i) for i in range(self.num_hidden_layers)]
        super().__post_init__(**kwargs)

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if value is None and name in OWN and self.layer_types is not None:
            return self._own(OWN[name])
        return value

    def _own(self, name: str) -> Any:
        """What the first layer that a cache keeps keys of has, or the first."""
        kept = [i for i in range(self.num_hidden_layers) if self._class(i).supports.cache == "keys"]
        layer = kept[0] if kept else 0
        causal = self._class(layer).supports.causal
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                return getattr(self.make_attention(layer, causal=causal), name)
        except (ValueError, NotImplementedError):
            return None

    def _class(self, layer: int) -> Any:
        return registry.find(self.choice(layer)[0]).object

    def choice(
        self, layer: int, where: str = "attention"
    ) -> tuple[str, str | None, dict[str, Any]]:
        """The mechanism of a layer, its mask if a mask was named, and the options written with it."""
        own = getattr(self, where)
        written = self.attention if own is None else own
        pattern: list[Any] = list(written) if isinstance(written, list | tuple) else [written]
        if not pattern or self.num_hidden_layers % len(pattern):
            raise ValueError(
                f"attention: a pattern of {len(pattern)} does not divide "
                f"num_hidden_layers={self.num_hidden_layers}"
            )
        chosen = pattern[layer % len(pattern)]
        options = dict(chosen) if isinstance(chosen, Mapping) else {"name": chosen}
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise ValueError(f"attention takes names, or options with a 'name', got {chosen!r}")
        if name in MASKS:
            if name == "window" and "size" not in options:
                if self.sliding_window is None:
                    raise ValueError("attention: 'window' needs sliding_window, or its own size")
                options["size"] = self.sliding_window
            return "softmax", name, options
        entry = registry.find(name)
        if entry.kind is not LAYER:
            raise ValueError(f"attention: {name!r} is no layer but a registered {entry.kind.name}")
        return entry.name, None, options

    def make_attention(
        self, layer: int, where: str = "attention", *, causal: bool = False, cross: bool = False
    ) -> Attention:
        """The attention of a layer, as the field `where` has it.

        Raises:
            ValueError: what does not fit, with the mechanism's name.
        """
        name, mask, options = self.choice(layer, where)
        cls: Any = registry.find(name).object
        if causal and not cls.supports.causal:
            raise ValueError(f"attention: {name!r} has no causal form, which a decoder needs")
        if cross and not cls.supports.cross:
            raise ValueError(f"attention: {name!r} has no cross form, which cross-attention needs")
        if cross and cls.supports.queries == "all":
            raise ValueError(
                f"attention: {name!r} cannot be a decoder's cross-attention: what a query gets rests on "
                "all queries, so that a token of the target would see those to come"
            )
        taken = _takes(name, mask)
        common = {k: v for k, v in (self.attention_options or {}).items() if k in taken}
        options = {**common, **options}
        if mask is not None:  # which speaks of distances, that cross-attention does not have
            options = {} if cross else {"mask": MASKS[mask](**options)}
        sizes: dict[str, Any] = {
            **{option: vars(self).get(name) for name, option in OWN.items()},
            "dropout": self.attention_dropout or None, "bias": self.attention_bias or None,
            "position": None if cross else self._position(cls, causal),
        }  # fmt: skip
        given = {
            "dim": self.hidden_size, "heads": self.num_attention_heads, "causal": causal,
            "layer_idx": layer, **{k: v for k, v in sizes.items() if v is not None}, **options,
        }  # fmt: skip
        try:
            made: Attention = in_full_precision(name, given)
        except (ValueError, TypeError) as error:
            raise ValueError(f"attention {name!r} in layer {layer}: {error}") from error
        rope = made.position_encoding
        if (
            isinstance(rope, RoPE)
            and given.get("position") == "rope"
            and self.rope_theta != 10000.0
        ):
            made.position_encoding = RoPE(2 * rope.frequencies.shape[-1], self.rope_theta)
        for module in made.modules():  # a mechanism initialises itself; Transformers shall not
            mark_initialized(module)
        return made

    def _position(self, cls: Any, causal: bool) -> Any:
        if self.position == "auto":
            return "rope" if cls.supports.position else None
        if self.position == "learned":
            return Learned(self.hidden_size, self.max_position_embeddings)
        if self.position == "t5":
            return T5Bias(self.num_attention_heads, bidirectional=not causal)
        return None if self.position == "none" else self.position

    def _layer_type(self, layer: int) -> str:
        _, mask, options = self.choice(layer)
        slides = mask == "window" and options["size"] == self.sliding_window
        return "sliding_attention" if slides else "full_attention"


def _takes(name: str, mask: str | None = None) -> Mapping[str, Any]:
    """Options of a layer, or of the mask that stands for one."""
    return registry.signature(MASKS[mask] if mask else registry.find(name).object)


def in_full_precision(name: str, options: dict[str, Any]) -> Any:
    """Made in float32 where the default is less, since constants would be rounded otherwise."""
    wanted = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.promote_types(wanted, torch.float32))
        made: nn.Module = registry.make(name, **options)
    finally:
        torch.set_default_dtype(wanted)
    return made.to(wanted)
