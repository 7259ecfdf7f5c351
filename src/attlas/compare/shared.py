"""One context, read once for all methods.

Cache policies leave the prefill exact: they look on and compress afterwards, so all of them share
one. A part that changes attention itself reads the context alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from attlas.attach import Part, attach
from attlas.compare.methods import Method
from attlas.parts.cache.policy import CachePolicy
from attlas.parts.cache.prompt import prefill


class Reading:
    """A context that was prefilled; `fork` gives a method's cache as often as it is asked for.

    Args:
        model: the model.
        context: token ids.
        methods: those that will be forked.
    """

    def __init__(self, model: Any, context: Sequence[int], methods: Sequence[Method]) -> None:
        self.model = model
        self.ids = torch.tensor([list(context)], device=model.device)
        self.parts = {method.label: method.part() for method in methods}
        policies = [part for part in self.parts.values() if shares_prefill(part)]
        self.prompt = prefill(model, self.ids, policies)
        self.own: dict[str, Any] = {}

    def fork(self, method: Method) -> Any:
        """A cache of the context as the method keeps it, to be used once, inside `attached`."""
        part = self.parts[method.label]
        if part is None or shares_prefill(part):
            return self.prompt.fork(part)
        if method.label not in self.own:
            self.own[method.label] = forward(self.model, self.ids, None).past_key_values
        return copy.deepcopy(self.own[method.label])

    def attached(self, method: Method) -> AbstractContextManager[Any]:
        """The block inside which the method's caches are used."""
        return attached(self.model, self.parts[method.label])


def shares_prefill(part: Part | None) -> bool:
    """Whether a part's prefill is the model's own."""
    return isinstance(part, CachePolicy) and getattr(part, "exact_prefill", True)


def attached(model: Any, part: Part | None) -> AbstractContextManager[Any]:
    """`attach(model, part)`; the bare model for full attention."""
    return nullcontext() if part is None else attach(model, part)


def forward(model: Any, ids: Tensor, cache: Any, logits: int = 1) -> Any:
    """One call of the model: logits of the last `logits` tokens (0: of all) and its cache."""
    return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=logits)


def cache_bytes(cache: Any) -> int:
    """Bytes of keys, values and slot indices that a cache holds."""
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in cache.layers
        for name in ("keys", "values", "index")
        if isinstance(tensor := getattr(layer, name, None), Tensor)
    )
