"""One context, read once for all methods.

Cache policies leave the prefill exact: they look on and compress afterwards, so all of them share
one. A part that changes attention itself reads the context alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from attlas.attach import Part, attach
from attlas.attach.part import Selector
from attlas.cache.part import CachePart
from attlas.cache.policy import CachePolicy
from attlas.cache.prompt import Prompt, prefill
from attlas.compare.methods import Method
from attlas.hf.caches import cache_of, with_cache


class Reading:
    """A context that was prefilled; `fork` gives a method's cache as often as it is asked for.

    Attributes:
        model: the model.
        ids: token ids [1, tokens].
        parts: by label, the parts of the methods that will be forked; none for the full cache.
        prompt: the context as the model read it, all that share it looking on.
    """

    def __init__(
        self, model: Any, ids: Tensor, parts: Mapping[str, tuple[Part, ...]], prompt: Prompt
    ) -> None:
        self.model, self.ids, self.parts, self.prompt = model, ids, parts, prompt
        self.own: dict[str, Any] = {}

    @classmethod
    def of(cls, model: Any, context: Sequence[int], methods: Sequence[Method]) -> Reading:
        """Read a context."""
        ids = torch.tensor([list(context)], device=model.device)
        parts = {method.label: method.parts() for method in methods}
        sharing = [cache_parts(one) for one in parts.values() if one and shares(one)]
        return cls(model, ids, parts, prefill(model, ids, sharing))

    def extended(self, more: Sequence[int]) -> Reading:
        """The context with `more` read behind it; this reading stays as it is."""
        ids = torch.tensor([list(more)], device=self.model.device)
        prompt = self.prompt.extend(self.model, ids)
        return Reading(self.model, torch.cat([self.ids, ids], dim=1), self.parts, prompt)

    def fork(self, method: Method) -> tuple[Any, Tensor]:
        """A cache of the context as the method keeps it, to be used once, and the next logits.

        Call it inside `attached(method)`.
        """
        parts = self.parts[method.label]
        if shares(parts):
            return self.prompt.fork(cache_parts(parts)), self.prompt.logits
        if method.label not in self.own:
            output = forward(self.model, self.ids, None)
            self.own[method.label] = cache_of(output), output.logits[:, -1]
        cache, logits = self.own[method.label]
        return copy.deepcopy(cache), logits

    def attached(self, method: Method) -> AbstractContextManager[Any]:
        """The block inside which the method's caches are used."""
        return attached(self.model, self.parts[method.label])


def cache_parts(parts: Sequence[Part]) -> list[CachePart]:
    """Those of a method's parts that deal with the cache."""
    return [part for part in parts if isinstance(part, CachePart)]


def shares(parts: Sequence[Part]) -> bool:
    """Whether a method's prefill is the model's own, so that it can share it."""
    return all(isinstance(part, CachePart) and part.exact_prefill for part in parts)


def stepwise(parts: Sequence[Part]) -> bool:
    """Whether what a method does with a token depends on tokens coming one at a time.

    What thins out a prompt takes several tokens for a piece of one.
    """
    return any(isinstance(part, Selector) for part in parts) or any(
        not isinstance(part, CachePolicy) or part.while_decoding for part in cache_parts(parts)
    )


def attached(model: Any, parts: Sequence[Part]) -> AbstractContextManager[Any]:
    """`attach(model, *parts)`; the bare model for full attention."""
    return attach(model, *parts) if parts else nullcontext()


def forward(model: Any, ids: Tensor, cache: Any, logits: int = 1) -> Any:
    """One call of the model: logits of the last `logits` tokens (0: of all) and its cache."""
    return model(ids, **with_cache(model, cache), use_cache=True, logits_to_keep=logits)
