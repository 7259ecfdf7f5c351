"""Position encodings that layers share: absolute, rotary, biases."""

from __future__ import annotations

from collections.abc import Callable

from attlas.errors import UnknownName
from attlas.positions.absolute import Learned, Sinusoidal
from attlas.positions.base import Position, ScoreMod, additive, by_groups
from attlas.positions.bias import ALiBi, T5Bias
from attlas.positions.rope import RoPE

__all__ = [
    "ALiBi",
    "Learned",
    "Position",
    "RoPE",
    "ScoreMod",
    "Sinusoidal",
    "T5Bias",
    "additive",
    "by_groups",
    "named",
]


def named(name: str, *, dim: int, heads: int, head_dim: int) -> Position:
    """The position encoding called `name` with its paper's defaults.

    Raises:
        UnknownName: not one of none, learned, sinusoidal, rope, alibi, t5.
    """
    makers: dict[str, Callable[[], Position]] = {
        "none": Position,
        "learned": lambda: Learned(dim),
        "sinusoidal": lambda: Sinusoidal(dim),
        "rope": lambda: RoPE(head_dim),
        "alibi": lambda: ALiBi(heads),
        "t5": lambda: T5Bias(heads),
    }
    if name not in makers:
        raise UnknownName("position", name, makers)
    return makers[name]()
