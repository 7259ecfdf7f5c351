"""What attaches to a cache: policies that drop keys, quantisers, and what they have in common."""

from attlas.cache.budget import Budget
from attlas.cache.part import CachePart
from attlas.cache.policy import CachePolicy, Slots
from attlas.cache.prompt import Prompt, prefill
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
