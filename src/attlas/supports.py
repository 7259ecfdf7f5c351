"""What a layer can be asked for. What it cannot is refused by name, before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from attlas import masks
from attlas.masks import Mask
from attlas.positions import Position


@runtime_checkable
class Form(Protocol):
    """What a layer was asked to be."""

    dim: int
    context_width: int
    heads: int
    kv_heads: int
    causal: bool
    layer_idx: int
    own_mask: Mask | None
    own_position: Position | str | None
    supports: ClassVar[Supports]


@dataclass(frozen=True, kw_only=True)
class Supports:
    """A class says what differs: `supports = Supports(cross=False)`; a subclass of one that differs
    already, `supports = replace(LinearAttention.supports, cross=False)`.

    Attributes:
        causal: it has a causal form; without one it cannot decode step by step either.
        bidirectional: queries may see what comes after them.
        cross: queries may come from one sequence and keys from another.
        position: it takes a position encoding; False where it brings its own positions.
        masks: it honours "pairs", any mask; "padding", valid tokens only; "none", no mask at all.
        cache: decoding keeps "keys" and values of all tokens, or a "state" that does not grow.
        remembers: a cache keeps more of it than keys and values, so that tokens cannot be taken back.
        maps: `weights` tells the map that its output is summed with.
        memory: how a forward pass's extra memory grows with the length, "linear" or "quadratic".
        queries: on which queries of a call the output of one rests: "alone", itself; "earlier", those
            before it too, so that a decoder's cross-attention has the whole target at every step; "all",
            so that it is no cross-attention of a decoder, whose tokens would see those to come.
        graph_breaks: why `torch.compile` takes it in more than one graph, so that `fullgraph=True` is
            refused; empty where it is one.
        one_length: why `torch.export` makes a program of it for one length alone; empty where for any.
        counts: it counts tokens by their order, whatever positions they are told; others are refused.
        gaps: padding may stand between the tokens of a row; else it is refused there.
        extras: names of further tensors that `forward` takes by keyword, for stages to read from
            `inputs.extras`.
    """

    causal: bool = True
    bidirectional: bool = True
    cross: bool = True
    position: bool = True
    masks: Literal["pairs", "padding", "none"] = "pairs"
    cache: Literal["keys", "state"] = "keys"
    remembers: bool = False
    maps: bool = True
    memory: Literal["linear", "quadratic"] = "linear"
    queries: Literal["alone", "earlier", "all"] = "alone"
    graph_breaks: str = ""
    one_length: str = ""
    counts: bool = False
    gaps: bool = True
    extras: tuple[str, ...] = ()

    @property
    def takes_back(self) -> bool:
        """Whether the last tokens can be taken back from its cache, as assisted decoding does."""
        return self.cache == "keys" and not self.remembers

    def check_made(self, layer: Form) -> None:
        """Refuse a layer of a form that its class has not, or of sizes that do not divide.

        Raises:
            ValueError: naming the option.
        """
        name = type(layer).__name__
        if layer.heads % layer.kv_heads:
            raise ValueError(f"kv_heads must divide heads={layer.heads}, got {layer.kv_heads}")
        if layer.causal and not self.causal:
            raise ValueError(f"causal=True: {name} has no causal form")
        if not layer.causal and not self.bidirectional:
            raise ValueError(f"causal=False: {name} has no other form than a causal one")
        self.check_mask(name, layer.own_mask)
        if layer.own_position is not None and not self.position:
            raise ValueError(
                f"position: {name} brings its own positions, got {layer.own_position!r}"
            )

    def check_call(
        self, layer: Form, encoding: Position, x: Tensor, context: Tensor | None, mask: Any, cache: Any,
        extras: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """Refuse what a forward pass cannot honour.

        Raises:
            ValueError: inputs of another width, a context where there is no cross form or with a
                cache, a mask of another shape, a cache without a causal form.
            TypeError: an unknown keyword, or a mask that is none.
        """
        name = type(layer).__name__
        if extras and (unknown := sorted(set(extras) - set(self.extras))):
            takes = f"takes {list(self.extras)}" if self.extras else "takes no extras"
            raise TypeError(f"{name} {takes}, got {unknown[0]!r}")
        _check_tokens("x", x, layer.dim)
        if context is not None:
            _check_tokens("context", context, layer.context_width)
            self._check_context(layer, encoding, cache)
        elif layer.context_width != layer.dim:
            raise ValueError(
                f"context must be given: {name} reads tokens {layer.context_width} wide, and x is "
                f"{layer.dim} wide"
            )
        if cache is not None and not self.causal:
            raise ValueError(f"cache was given, but {name} has no causal form")
        if mask is None:
            return
        self.check_mask(name, mask)
        if not isinstance(mask, Mask | Tensor):
            raise TypeError(f"mask takes a Mask or a boolean tensor, got {type(mask).__name__}")
        if isinstance(mask, Tensor) and mask.ndim not in (2, 4):
            raise ValueError(f"mask must have 2 or 4 axes, got {list(mask.shape)}")

    def _check_context(self, layer: Form, encoding: Position, cache: Any) -> None:
        if cache is not None or layer.causal or not self.cross:
            form = "causal=True" if layer.causal else type(layer).__name__
            why = form if cache is None else "a cache"
            raise ValueError(f"context cannot be given together with {why}")
        if encoding.score_mod is not None:
            position = type(encoding).__name__
            raise ValueError(
                f"context cannot be given together with position={position}: distances between two "
                "sequences mean nothing"
            )

    def check_mask(self, name: str, mask: Any) -> None:
        """Refuse a mask of a sort that the layer called `name` does not honour.

        Raises:
            ValueError: saying which it takes.
        """
        patterns = (None, masks.causal) if self.causal else (None,)
        per_pair = mask.ndim == 4 if isinstance(mask, Tensor) else mask not in patterns
        refused = per_pair if self.masks == "padding" else mask is not None
        if self.masks != "pairs" and refused:
            takes = "only padding, [batch, keys]" if self.masks == "padding" else "none"
            raise ValueError(f"mask: {name} takes {takes}, got {mask!r}")


def _check_tokens(what: str, tokens: Tensor, dim: int) -> None:
    if tokens.ndim != 3 or tokens.shape[-1] != dim:
        raise ValueError(f"{what} must be [batch, tokens, {dim}], got {list(tokens.shape)}")


def share_of_dim(layer: Any, maps: int = 1) -> int:
    """dim / (heads · maps), the width of a head, or of each of its maps.

    Raises:
        ValueError: `heads · maps` does not divide `dim`.
    """
    if layer.dim % (layer.heads * maps):
        whole = f"dim={layer.dim}" if maps == 1 else f"dim / {maps} = {layer.dim / maps:g}"
        raise ValueError(f"heads must divide {whole} unless head_dim is given, got {layer.heads}")
    return int(layer.dim // (layer.heads * maps))
