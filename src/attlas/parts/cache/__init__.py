"""Cache policies: which keys and values stay after the prompt."""

from attlas.parts.cache.budget import Budget
from attlas.parts.cache.layer import CompressedLayer, LayerState
from attlas.parts.cache.policy import CachePolicy, Slots
from attlas.parts.cache.prompt import Prompt, prefill

__all__ = [
    "Budget",
    "CachePolicy",
    "CompressedLayer",
    "LayerState",
    "Prompt",
    "Slots",
    "prefill",
]
