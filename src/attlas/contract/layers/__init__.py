"""The checks of layers: what every subclass of `attlas.Attention` is held to."""

from attlas.contract.layers import arguments, numbers, sequence, shapes, state, training

__all__ = ["arguments", "numbers", "sequence", "shapes", "state", "training"]
