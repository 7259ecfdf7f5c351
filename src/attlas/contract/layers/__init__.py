"""The checks of layers: what every subclass of `attlas.Attention` is held to, beside networks'."""

from attlas.contract.layers import arguments, numbers, sequence, shapes

__all__ = ["arguments", "numbers", "sequence", "shapes"]
