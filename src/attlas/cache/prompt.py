"""One exact prefill, from which the caches of several parts fork."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attlas.attach import Call, Part, attach
from attlas.attach.call import Site
from attlas.cache.part import CachePart, check_together
from attlas.errors import UserError
from attlas.hf.caches import (
    DUMMY_LAYERS,
    DynamicCache,
    DynamicLayer,
    cache_of,
    fresh_layers,
    with_cache,
)
from attlas.hf.sources import own_cache, takes_cache
from attlas.options import option
from attlas.storage.layer import LayerState, StoredLayer
from attlas.storage.plain import forked, forked_layer, tensors
from attlas.storage.rows import Rows

Method = CachePart | Sequence[CachePart]


def parts_of(method: Method | None) -> tuple[CachePart, ...]:
    """The parts that work together on one cache; none for the whole cache."""
    if method is None:
        return ()
    return (method,) if isinstance(method, CachePart) else tuple(method)


class _Watch(Part):
    """Lets several parts learn from the same prompt."""

    parts: Sequence[CachePart] = option("parts that learn", kw_only=False)

    def setup(self) -> None:
        """Ask for the hidden states, and the points of the stream, where a part needs them."""
        self.wants_hidden = any(part.wants_hidden for part in self.parts)
        points = dict.fromkeys(point for part in self.parts for point in part.points)
        self.points = tuple(points)  # those of a class, of this watch alone
        self.states: list[dict[int, LayerState]] = []

    def check(self, model: nn.Module) -> None:
        for part in self.parts:
            part.check(model)

    def prepare(self, layers: list[Any], model: nn.Module) -> None:
        self.states = [part.states(layers, model) for part in self.parts]

    def fork(self) -> _Watch:
        """A watch that learns on from here, leaving this one as it is."""
        other = _Watch(self.parts)
        other.states = [{i: state.fork() for i, state in states.items()} for states in self.states]
        return other

    def stream(self, site: Site, x: Float[Tensor, "batch query width"]) -> None:
        for part in self.parts:
            if site.point in part.points:
                part.stream(site, x)

    def observe(self, call: Call) -> None:
        for part, states in zip(self.parts, self.states, strict=True):
            if (state := states.get(call.layer)) is not None:
                part.take_note(state, call)
                part.learn(state, call)

    def of(self, part: CachePart) -> dict[int, LayerState]:
        """What a part has learned, by layer.

        Raises:
            ValueError: it did not see the prompt.
        """
        for known, states in zip(self.parts, self.states, strict=True):
            if known is part:
                return {i: state.fork() for i, state in states.items()}
        raise UserError(
            f"this {type(part).__name__} did not see the prompt; name it in "
            "prefill(model, input_ids, parts)"
        )


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

    def fork(self, method: Method | None = None) -> DynamicCache:
        """A cache to go on from: whole without a part, else what the part, or several, make of it.

        Go on under `attach(model, part)`, or `attach(model)` for the whole cache. Each call gives
        a new cache.

        Raises:
            ValueError: a part that did not see the prompt, or parts that cannot work together.
        """
        parts = parts_of(method)
        if not parts:
            return forked(self.cache)
        check_together(list(parts))
        fork = DynamicCache()
        learned = {part.name: self._watch.of(part) for part in parts}
        valid = None if self.attention_mask is None else self.attention_mask.bool()
        rows = Rows(valid, self.tokens)
        for number, layer in enumerate(self.cache.layers):
            states = {name: known[number] for name, known in learned.items() if number in known}
            if states:
                layer = _stored(layer, states)
                for part in parts:
                    part.compress(layer, layer.learned[part.name], rows)
                layer.compressed = True
            else:
                layer = forked_layer(layer)
            fork.layers.append(layer)
        return fork

    @torch.no_grad()
    def extend(self, model: nn.Module, input_ids: Int[Tensor, "batch tokens"]) -> Prompt:
        """A longer prompt: what follows is read as exactly, and all parts learn from it too.

        This prompt stays as it is, so that one context can be extended by many questions.

        Args:
            model: the model that read this prompt.
            input_ids: the tokens that follow, without padding.
        """
        mask, watch = self.attention_mask, self._watch.fork()
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(input_ids.shape)], dim=1)
        cache = forked(self.cache)
        logits, cache = _read(model, input_ids, cache, watch, mask, None)
        return Prompt(cache, logits, mask, watch)


@torch.no_grad()
def prefill(
    model: nn.Module,
    input_ids: Int[Tensor, "batch tokens"],
    methods: Sequence[Method] = (),
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None = None,
    chunk: int | None = None,
) -> Prompt:
    """Run a context through the model once, exactly, while all parts learn from it.

    Args:
        model: a Transformers decoder.
        input_ids: the context.
        methods: parts that will be asked for forks, or several that work together on one cache.
        attention_mask: 0 for padding.
        chunk: tokens per forward call, to bound memory; all at once unless given.

    Raises:
        ValueError: a chunk below 1, or a part that cannot work on the model.
    """
    if chunk is not None and chunk < 1:
        raise UserError(f"chunk must be at least 1, got {chunk}")
    tokens = input_ids.shape[1]
    if not tokens:
        raise UserError("input_ids holds no token")
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise UserError("attention_mask must pad on the left, so that every row ends with a token")
    if not takes_cache(model) or getattr(model.config, "is_encoder_decoder", False):
        raise UserError(
            f"a prompt of {type(model).__name__} cannot be forked: what it remembers of a text is in "
            "its modules, or behind an encoder, and not in a cache that it is given"
        )
    every = [part for method in methods for part in parts_of(method)]
    watch = _Watch(list({id(part): part for part in every}.values()))
    for part in watch.parts:
        part.check(model)
    watch.prepare(fresh_layers(model) if watch.parts else [], model)
    config: Any = model.config
    # A model with a cache of its own makes it.
    own = own_cache(model) is not None
    cache = None if own else DynamicCache(config=config.get_text_config(decoder=True))
    logits, cache = _read(model, input_ids, cache, watch, attention_mask, chunk)
    stateful = getattr(model, "_is_stateful", False) and not type(model).__module__.startswith("attlas")
    for number, layer in enumerate(cache.layers):
        # A layer of ours that lost its attention leaves nothing and remembers nothing.
        states = stateful or hasattr(layer, "recurrent_states")
        if states and type(layer) not in DUMMY_LAYERS and not any(True for _ in tensors(layer)):
            raise UserError(
                f"a prompt of {type(model).__name__} cannot be forked: layer {number} leaves nothing "
                "in the cache, and keeps what it remembers in its modules"
            )
    return Prompt(cache, logits, attention_mask, watch)


def _read(
    model: nn.Module, input_ids: Tensor, cache: DynamicCache | None, watch: _Watch,
    mask: Tensor | None, chunk: int | None,
) -> tuple[Tensor, DynamicCache]:  # fmt: skip
    """(next-token logits, the cache extended); updates every part's statistics."""
    seen, tokens = 0 if cache is None else int(cache.get_seq_length()), input_ids.shape[1]
    with attach(model, *([watch] if watch.parts else [])):
        for start in range(0, tokens, chunk or tokens):
            stop = min(start + (chunk or tokens), tokens)
            options = {} if mask is None else _padded(mask, seen + start, seen + stop)
            output: Any = model(
                input_ids[:, start:stop], use_cache=True, logits_to_keep=1,
                **with_cache(model, cache), **options,
            )  # fmt: skip
            cache = cache if cache is not None else cache_of(output)
    assert cache is not None
    logits: Tensor = output.logits[:, -1]
    return logits, cache


def _padded(mask: Tensor, start: int, stop: int) -> dict[str, Tensor]:
    """Mask and positions of a chunk, counted over valid tokens as generate() counts them."""
    positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)
    return {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}


def _stored(layer: DynamicLayer, states: dict[str, LayerState]) -> StoredLayer:
    """A stored layer that shares the tensors of a prompt's."""
    other = StoredLayer(states)
    other.take_over(layer)
    return other
