"""Transformers' caches, recognised by their type, and the names under which they travel.

Transformers 5.24 calls `cache` what was `past_key_values` before: in `generate`, in the arguments of
every model and in what models give. Models take their cache under a name from their own signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    StaticCache,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from attlas.errors import UserError

__all__ = [
    "DUMMY_LAYERS",
    "NAME",
    "NAMES",
    "Cache",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "EncoderDecoderCache",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "LinearAttentionLayer",
    "StaticCache",
    "argument",
    "cache_in",
    "cache_of",
    "filled",
    "fresh_layers",
    "refuse_other",
    "the_cache",
    "windows",
    "with_cache",
]

#: The layer that holds nothing, where the installed version has one (5.20 does not).
DUMMY_LAYERS: tuple[type, ...] = tuple(
    kind for name in ("DummyLayer",) if (kind := getattr(cache_utils, name, None)) is not None
)
#: Names of the cache, the newer first.
NAMES = ("cache", "past_key_values")
#: What the installed version calls the cache.
NAME = next(name for name in NAMES if name in inspect.signature(BaseModelOutputWithPast).parameters)


@lru_cache(maxsize=256)
def argument(model: Any) -> str:
    """The name under which `forward` of a class of models takes its cache."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in (NAME, *NAMES) if name in known), NAME)


def with_cache(model: Any, cache: Cache | None) -> dict[str, Cache | None]:
    """The cache as a keyword argument of the model: `model(ids, **with_cache(model, cache))`."""
    kind: Any = type(model)
    return {argument(kind): cache}


def cache_in(arguments: Mapping[str, Any], model: type) -> tuple[str, Cache | None]:
    """(name, cache) among a call's arguments, under whichever name it was given.

    Raises:
        ValueError: something that is no Transformers cache, such as continuous batching's.
    """
    name = next((n for n in NAMES if arguments.get(n) is not None), argument(model))
    found = arguments.get(name)
    refuse_other(name, found)
    return name, found


def refuse_other(name: str, given: Any) -> None:
    """Refuse what is given as a cache and is none.

    Raises:
        ValueError: a paged cache, or anything else that is no `Cache`, by its type.
    """
    if given is not None and not isinstance(given, Cache):
        raise UserError(
            f"attach cannot honour {name}: {type(given).__name__} is no transformers.Cache, and "
            "continuous batching's paged cache cannot be intercepted; use generate()"
        )


def own_tokens(cache: Any) -> Any:
    """Of a decoder behind an encoder the cache of its own tokens; any other as it is."""
    return getattr(cache, "self_attention_cache", cache)


def cache_of(output: Any) -> Cache | None:
    """The cache in what a model gave, a `ModelOutput` or a tuple; None where there is none."""
    values: Iterable[Any] = ()
    if isinstance(output, Mapping):
        values = output.values()
    elif isinstance(output, tuple):
        values = output
    return next((value for value in values if isinstance(value, Cache)), None)


def the_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """What was given under either name.

    Raises:
        ValueError: two different caches.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("give cache or past_key_values, which are one argument, and not both")
    return past_key_values if cache is None else cache


def fresh_layers(model: Any) -> list[Any]:
    """The layers that an empty cache of this decoder comes with."""
    layers: list[Any] = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return layers


def windows(layers: Iterable[Any]) -> tuple[int, ...]:
    """Lengths of the sliding-window layers among a cache's layers."""
    return tuple(layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False))


def filled(layer: DynamicLayer, keys: Tensor, values: Tensor) -> DynamicLayer:
    """The layer, holding these keys and values."""
    # Sets what the installed version wants to be set: before 5.24 a dtype too.
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer
