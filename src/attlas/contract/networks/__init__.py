"""The checks of networks: what every kind of `nn.Module` is held to, a layer or one for feature maps."""

from attlas.contract.networks import outputs, precision, state, training

__all__ = ["outputs", "precision", "state", "training"]
