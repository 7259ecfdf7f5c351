"""Cache layers of Transformers, whatever their kind: what they hold, its bytes, and copies of it.

Some kinds replace their tensors when they grow; others write into them, as recurrent states, convolutions
and preallocated layers do. Only those that are known to replace are copied by sharing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from attlas.hf.caches import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from attlas.storage.layer import StoredLayer

#: Kinds whose `update` makes new tensors and leaves the old ones alone.
REPLACING = (DynamicLayer, DynamicSlidingWindowLayer)


def forked(cache: DynamicCache) -> DynamicCache:
    """A cache that goes on from here, leaving the given one as it is whatever comes."""
    other = copy(cache)
    for name, held in vars(cache).items():
        if name != "layers" and any(True for _ in tensors(held)):
            setattr(other, name, deepcopy(held))
    other.layers = [forked_layer(layer) for layer in cache.layers]
    return other


def forked_layer(layer: Any) -> Any:
    """A layer that goes on alone; it shares tensors where growing replaces them, else has its own."""
    if isinstance(layer, StoredLayer):
        return layer.fork()
    # What captured steps write to in place is marked.
    replaces = type(layer) in REPLACING and not getattr(layer, "_seated", False)
    return copy(layer) if replaces else deepcopy(layer)


def tensors(held: Any) -> Iterator[Tensor]:
    """The tensors that a cache layer holds, in whatever attribute, list or dict; counters aside."""
    waiting: list[Any] = [held]
    known: dict[int, Any] = {}  # kept, so that no number of theirs is given to another
    while waiting:
        each = waiting.pop()
        if id(each) in known:
            continue
        known[id(each)] = each
        if isinstance(each, Tensor):
            if each.ndim > 1:
                yield each
        elif isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, (list, tuple)):
            waiting += each
        elif hasattr(each, "__dict__") and not isinstance(each, (nn.Module, type)):
            waiting += [x for n, x in vars(each).items() if not n.startswith("_")]


def memory(held: Iterable[Tensor]) -> int:
    """Bytes of the memory that these tensors keep, each piece counted once."""
    pieces = [x.untyped_storage() for x in held]
    return sum({piece.data_ptr(): piece.nbytes() for piece in pieces}.values())


def release(layers: Iterable[Any], spare: int = 0) -> None:
    """Let sliding windows go that are views of a longer text, whose whole memory they would keep.

    Args:
        layers: of a cache; others than sliding windows that grow by replacing are left alone.
        spare: tokens beyond the window that may stay, so that a step need not copy it twice.
    """
    for layer in layers:
        if type(layer) is not DynamicSlidingWindowLayer or not isinstance(layer.keys, Tensor):
            continue
        for name in ("keys", "values"):
            held: Tensor = getattr(layer, name)
            token = held.nbytes // max(1, held.shape[2])
            if held.untyped_storage().nbytes() > held.nbytes + spare * token:
                setattr(layer, name, held.clone())


def taken_apart(layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, plain values) that make a layer again, by attribute, and by key in a dict of it."""
    found: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, held in vars(layer).items():
        if name.startswith("_") or isinstance(held, (torch.device, torch.dtype)):
            continue
        parts = {name: held}
        if isinstance(held, dict):
            parts = {f"{name}.{key}": each for key, each in held.items()}
        for path, part in parts.items():
            (found if isinstance(part, Tensor) else values)[path] = part
    return found, values


def put_together(layer: Any, found: dict[str, Tensor], values: dict[str, Any]) -> Any:
    """An empty layer of the same kind, filled with what `taken_apart` gave."""
    for path, held in {**values, **found}.items():
        name, _, key = path.partition(".")
        if key:
            getattr(layer, name)[int(key)] = held
        else:
            setattr(layer, name, held)
    for tensor in found.values():
        layer.device, layer.dtype = tensor.device, tensor.dtype
    return layer
