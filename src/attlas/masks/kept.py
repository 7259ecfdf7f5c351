"""What was worked out for a mask, kept for the next call: never older than the mask, never longer held.

A pattern of numbers alone (`causal & window(64)`) is the same pattern wherever it is equal, and what is
worked out for it is kept by its value. A mask over tensors (`document(ids)`) is what its tensors hold,
and whoever owns them may fill them anew: what is kept for it rests on a copy, counts as long as the
tensors hold what the copy holds, and goes when the mask goes.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache, update_wrapper
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

import torch

from attlas.masks.algebra import Mask
from attlas.tracing import held, once, traced

R = TypeVar("R")

#: Answers kept for each mask over tensors, say of the lengths it was asked about.
EACH = 8


def kept_by_mask(maxsize: int) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Keep what a function makes of a mask and plain arguments; `maxsize` answers for patterns of numbers
    alone, `EACH` for each mask over tensors."""

    def keep(function: Callable[..., R]) -> Callable[..., R]:
        made = once(function)
        by_value = lru_cache(maxsize)(made)
        #: Of each mask over tensors: its copy and the answer, by the whole mask and the arguments.
        by_mask: WeakKeyDictionary[Mask, dict[Any, tuple[Mask, R]]] = WeakKeyDictionary()

        def call(mask: Mask, *args: Any, **given: Any) -> R:
            if traced():
                return function(mask, *args, **given)
            leaves = mask.leaves
            if not leaves:
                return held(by_value(mask, *args, **given))
            answers = by_mask.setdefault(leaves[0], {})
            key = (_structure(mask), args, tuple(given.items()))
            found = answers.pop(key, None)
            if found is None or not _alike(mask, found[0]):
                with torch.inference_mode(False):
                    copied = deepcopy(mask)
                found = copied, made(copied, *args, **given)
            answers[key] = found  # the last one asked for is the last one to go
            if len(answers) > EACH:
                del answers[next(iter(answers))]
            return held(found[1])

        return update_wrapper(call, function)

    return keep


def _structure(x: Any) -> Any:
    """What tells a mask apart, in which masks over tensors stand by identity without being held."""
    if isinstance(x, tuple):
        return tuple(map(_structure, x))
    if not isinstance(x, Mask) or not x.leaves:
        return x
    if x.leaves == (x,):
        return ref(x)
    return type(x), tuple((name, _structure(value)) for name, value in vars(x).items())


def _alike(mask: Mask, copied: Mask) -> bool:
    """Whether a mask's tensors hold what they held when it was copied."""
    return all(
        one.shape == two.shape and one.device == two.device and torch.equal(one, two)
        for a, b in zip(mask.leaves, copied.leaves, strict=True)
        for one, two in zip(a.tensors, b.tensors, strict=True)
    )
