"""Position encodings that layers share: absolute, rotary, biases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from attlas.errors import UnknownName
from attlas.positions.absolute import Learned, Sinusoidal
from attlas.positions.base import Position, Positioned, ScoreMod, additive, on_heads
from attlas.positions.bias import ALiBi, T5Bias
from attlas.positions.rope import RoPE

__all__ = [
    "ALiBi",
    "Learned",
    "Position",
    "Positioned",
    "RoPE",
    "ScoreMod",
    "Sinusoidal",
    "T5Bias",
    "additive",
    "encoding_of",
    "on_heads",
]


@runtime_checkable
class Sizes(Protocol):
    """What a layer tells of its sizes."""

    dim: int
    heads: int
    head_dim: int
    causal: bool


def encoding_of(given: Position | str | None, sizes: Sizes) -> Position:
    """The position encoding that a layer's option means, made for its sizes with its paper's defaults.

    Raises:
        UnknownName: not one of none, learned, sinusoidal, rope, alibi, t5.
    """
    if not isinstance(given, str):
        return Position() if given is None else given
    makers: dict[str, Callable[[], Position]] = {
        "none": Position,
        "learned": lambda: Learned(sizes.dim),
        "sinusoidal": lambda: Sinusoidal(sizes.dim),
        "rope": lambda: RoPE(sizes.head_dim),
        "alibi": lambda: ALiBi(sizes.heads),
        "t5": lambda: T5Bias(sizes.heads, bidirectional=not sizes.causal),
    }
    if given not in makers:
        raise UnknownName("position", given, makers)
    return makers[given]()
