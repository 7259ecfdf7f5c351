"""What a cache holds: layers for Transformers' caches, and the forms of keys and values in them."""

from attlas.storage.body import Body
from attlas.storage.coded import CodedBody
from attlas.storage.files import load_cache, save_cache
from attlas.storage.layer import Chosen, LayerState, StoredLayer
from attlas.storage.low_rank import LowRankBody
from attlas.storage.packed import PackedBody
from attlas.storage.ragged import RaggedBody
from attlas.storage.tiered import TieredBody

__all__ = [
    "Body",
    "Chosen",
    "CodedBody",
    "LayerState",
    "LowRankBody",
    "PackedBody",
    "RaggedBody",
    "StoredLayer",
    "TieredBody",
    "load_cache",
    "save_cache",
]
