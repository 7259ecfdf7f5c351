"""One exact prefill, from which caches of several policies fork."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from attlas.attach import Call, Part, attach
from attlas.errors import UserError
from attlas.parts.cache.layer import CompressedLayer, LayerState
from attlas.parts.cache.policy import CachePolicy


class _Watch(Part):
    """Lets several policies learn from the same prompt."""

    def __init__(self, policies: Sequence[CachePolicy]) -> None:
        self.policies = list(policies)
        self.states: list[dict[int, LayerState]] = []

    def check(self, model: nn.Module) -> None:
        for policy in self.policies:
            policy.check(model)

    def prepare(self, layers: list[Any], model: nn.Module) -> None:
        self.states = [policy.states(layers, model) for policy in self.policies]

    def fork(self) -> _Watch:
        """A watch that learns on from here, leaving this one as it is."""
        other = _Watch(self.policies)
        other.states = [{i: state.fork() for i, state in states.items()} for states in self.states]
        return other

    def observe(self, call: Call) -> None:
        for policy, states in zip(self.policies, self.states, strict=True):
            if (state := states.get(call.layer)) is not None:
                state.scaling = call.scaling
                policy.learn(state, call)


class Prompt:
    """A prefilled context.

    Attributes:
        cache: its whole cache; forks share its memory and never change it.
        logits: of the token that follows, [batch, vocabulary].
        attention_mask: as given.
        tokens: tokens of the context, padding included.
    """

    def __init__(
        self,
        cache: DynamicCache,
        logits: Float[Tensor, "batch vocabulary"],
        attention_mask: Int[Tensor, "batch tokens"] | None,
        watch: _Watch,
    ) -> None:
        self.cache = cache
        self.logits = logits
        self.attention_mask = attention_mask
        self.tokens = int(cache.get_seq_length())
        self._watch = watch

    def fork(self, policy: CachePolicy | None = None) -> DynamicCache:
        """A cache to go on from: whole without a policy, else what the policy keeps.

        Go on under `attach(model, policy)`, or `attach(model)` for the whole cache. Each call gives
        a new cache.

        Raises:
            ValueError: a policy that did not see the prompt, or its budget is too small.
        """
        if policy is None:
            return _copies(self.cache)
        fork = DynamicCache()
        if policy not in self._watch.policies:
            raise UserError(
                f"this {type(policy).__name__} did not see the prompt; name it in "
                "prefill(model, input_ids, policies)"
            )
        states = self._watch.states[self._watch.policies.index(policy)]
        real = None if self.attention_mask is None else self.attention_mask.bool()
        for number, layer in enumerate(self.cache.layers):
            if number in states:
                layer = _filled(layer, states[number].fork())
                policy.compress(layer, real)
            else:
                layer = _copy(layer)
            fork.layers.append(layer)
        return fork

    @torch.no_grad()
    def extend(self, model: nn.Module, input_ids: Int[Tensor, "batch tokens"]) -> Prompt:
        """A longer prompt: what follows is read as exactly, and all policies learn from it too.

        This prompt stays as it is, so that one context can be extended by many questions.

        Args:
            model: the model that read this prompt.
            input_ids: the tokens that follow, without padding.
        """
        mask, watch = self.attention_mask, self._watch.fork()
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(input_ids.shape)], dim=1)
        cache = _copies(self.cache)
        logits = _read(model, input_ids, cache, watch, mask, None)
        return Prompt(cache, logits, mask, watch)


@torch.no_grad()
def prefill(
    model: nn.Module,
    input_ids: Int[Tensor, "batch tokens"],
    policies: Sequence[CachePolicy] = (),
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None = None,
    chunk: int | None = None,
) -> Prompt:
    """Run a context through the model once, exactly, while all policies learn from it.

    Args:
        model: a Transformers decoder.
        input_ids: the context.
        policies: those that will be asked for forks.
        attention_mask: 0 for padding.
        chunk: tokens per forward call, to bound memory; all at once unless given.

    Raises:
        ValueError: a chunk below 1, or a policy that cannot work on the model.
    """
    if chunk is not None and chunk < 1:
        raise UserError(f"chunk must be at least 1, got {chunk}")
    tokens = input_ids.shape[1]
    if not tokens:
        raise UserError("input_ids holds no token")
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise UserError("attention_mask must pad on the left, so that every row ends with a token")
    watch = _Watch(policies)
    config: Any = model.config
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    watch.prepare(cache.layers, model)
    logits = _read(model, input_ids, cache, watch, attention_mask, chunk)
    return Prompt(cache, logits, attention_mask, watch)


def _read(
    model: nn.Module, input_ids: Tensor, cache: DynamicCache, watch: _Watch, mask: Tensor | None,
    chunk: int | None,
) -> Tensor:  # fmt: skip
    """Logits behind the last token, the cache grown and all policies the wiser."""
    seen, tokens = int(cache.get_seq_length()), input_ids.shape[1]
    with attach(model, *([watch] if watch.policies else [])):
        for start in range(0, tokens, chunk or tokens):
            stop = min(start + (chunk or tokens), tokens)
            options = {} if mask is None else _padded(mask, seen + start, seen + stop)
            logits: Tensor = model(
                input_ids[:, start:stop], past_key_values=cache, use_cache=True,
                logits_to_keep=1, **options,
            ).logits[:, -1]  # fmt: skip
    return logits


def _padded(mask: Tensor, start: int, stop: int) -> dict[str, Tensor]:
    """Mask and positions of a chunk, counted over real tokens as generate() counts them."""
    positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
    return {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}


def _copies(cache: DynamicCache) -> DynamicCache:
    """A cache that shares the tensors."""
    other = DynamicCache()
    other.layers = [_copy(layer) for layer in cache.layers]
    return other


def _copy(layer: DynamicLayer) -> DynamicLayer:
    """A layer that shares the tensors: updates make new ones and leave these alone."""
    other = object.__new__(type(layer))
    other.__dict__.update(layer.__dict__)
    return other


def _filled(layer: DynamicLayer, state: LayerState) -> CompressedLayer:
    filled = CompressedLayer(state)
    filled.__dict__ |= {name: x for name, x in layer.__dict__.items() if name in _HELD}
    filled.seen = layer.get_seq_length()
    return filled


_HELD = ("keys", "values", "is_initialized", "dtype", "device")
