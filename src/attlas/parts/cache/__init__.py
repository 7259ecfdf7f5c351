"""What attaches to a cache: policies that drop keys, quantisers, and what they have in common."""

from attlas.parts.cache.budget import Budget
from attlas.parts.cache.part import CachePart
from attlas.parts.cache.policy import CachePolicy, Slots
from attlas.parts.cache.prompt import Prompt, prefill
from attlas.storage.layer import LayerState, StoredLayer

__all__ = [
    "Budget",
    "CachePart",
    "CachePolicy",
    "LayerState",
    "Prompt",
    "Slots",
    "StoredLayer",
    "prefill",
]
