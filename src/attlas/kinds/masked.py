"""Masked: an adapter under which a pretrained model's own attention hides more pairs of tokens.

    visible = what the model shows  &  pattern(tokens)

The pattern is asked for once a call of the model and given to each of its attention modules as the mask
that they take anyway, so that caches, padding, sliding windows and `attach` work as before. A call that
hides nothing is left as it is. A paper's file gives `pattern`, or `pattern_of` where each layer hides
other pairs by what it is given, and what it trains as any adapter does.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attlas import masks
from attlas.attach.again import checkpoints
from attlas.attach.towers import is_attention, takes
from attlas.errors import UserError
from attlas.hf.caches import NAMES, Cache, the_cache
from attlas.hf.interface import implementation
from attlas.hf.sources import layers_of
from attlas.kinds.adapter import Adapter
from attlas.kinds.injection import Injection
from attlas.masks import Mask
from attlas.masks.algebra import Reach
from attlas.masks.patterns import ByTensor

#: Implementations of attention that take a mask of any pattern, with the one that adds it to scores.
DENSE, ADDED = ("sdpa", "eager"), "eager"


@dataclass(frozen=True, slots=True)
class Tokens:
    """What one call of the model reads.

    Attributes:
        batch: rows.
        offset: tokens that the cache had seen before.
        length: tokens of this call.
        ids: their ids; None when the model is given embeddings.
        valid: which of the tokens seen so far, these included, are no padding; None when all are.
        cache: the Transformers cache in use, None without one.
        training: whether the model is in training mode.
        device: where masks are wanted.
    """

    batch: int
    offset: int
    length: int
    ids: Int[Tensor, "batch length"] | None
    valid: Bool[Tensor, "batch seen"] | None
    cache: Cache | None
    training: bool
    device: torch.device

    @property
    def seen(self) -> int:
        """Tokens with those of this call."""
        return self.offset + self.length

    @property
    def ranks(self) -> Int[Tensor, "rows seen"]:
        """Place of each token among its row's valid ones, from 0; one row where all are alike."""
        if self.valid is None:
            return torch.arange(self.seen, device=self.device)[None]
        return self.valid.long().cumsum(-1) - 1


@dataclass(slots=True)
class _Pass:
    """The call under way: its tokens, its pattern, and the masks made so far."""

    tokens: Tokens
    pattern: Mask | None
    made: dict[Any, tuple[Tensor | None, Tensor]]


class Shown(ByTensor):
    """Pairs one by one, of the queries of a call and all columns up to its last.

    Args:
        pairs: True where they meet; heads are the queries', or one for all.
        first: column of the first query.
    """

    def __init__(self, pairs: Bool[Tensor, "batch heads queries columns"], first: int) -> None:
        super().__init__(pairs, fixed=True)
        self.batch, self.first = len(pairs), first
        self.heads = pairs.shape[1] if pairs.shape[1] > 1 else None

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Pairs of the table; columns behind the last, which a static cache has, are seen by none."""
        pairs = self.tensor(k)
        row = (q - self.first).clamp(0, pairs.shape[2] - 1)
        inside = k.clamp(0, pairs.shape[3] - 1)
        head = h if self.heads is not None else torch.zeros_like(h)
        return pairs[b, head, row, inside] & (k == inside)

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        """(some, every): only looked up pair by pair."""
        some = (k_lo == k_lo) & (q_lo == q_lo)
        return some, some & False


class Masked(Adapter):
    """Base of the adapters that hide pairs; a subclass that overrides `change` or `check` calls these."""

    def setup(self) -> None:
        """No call is under way."""
        super().setup()
        self._now: _Pass | None = None

    def pattern(self, tokens: Tokens) -> Mask | None:
        """Which pairs of columns may meet, besides what the model hides; None where nothing is hidden.

        Later tokens are hidden by the model.
        """
        raise NotImplementedError

    def pattern_of(
        self, layer: int, hidden: Float[Tensor, "batch length dim"], tokens: Tokens
    ) -> Mask | None:
        """Which pairs may meet in one layer, besides `pattern`.

        Args:
            layer: its number.
            hidden: what its attention is given.
            tokens: what the model reads.
        """
        return None

    def check(self, model: Any) -> None:
        """Refuse models whose attention takes no mask, and implementations that take no pattern.

        Raises:
            ValueError: naming the family, or the implementation.
        """
        family = model.config.model_type
        modules = _attention(model)
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        if lacking := sorted(set(range(layers)) - modules.keys()):
            raise UserError(
                f"{self.name} hides pairs in every layer, and layers {lacking[:4]} of {family} have no "
                "attention that takes an attention_mask"
            )
        if not getattr(next(iter(modules.values())), "is_causal", True):
            raise UserError(f"{self.name} takes causal language models, and {family} is none")
        if (name := implementation(model.config)) not in DENSE:
            raise UserError(
                f"{self.name} gives attention a mask of pairs, which {name!r} does not take; call "
                "model.set_attn_implementation('sdpa') before inject()"
            )

    def change(self, injection: Injection) -> None:
        """Listen to the calls of the model and of its attention."""
        base = injection.model.base_model
        injection.hook(base.register_forward_pre_hook(self._begin, with_kwargs=True))
        injection.hook(base.register_forward_hook(self._end, always_call=True))
        for module in _attention(injection.model).values():
            injection.hook(module.register_forward_pre_hook(self._narrow, with_kwargs=True))

    def _begin(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = [*inspect.signature(base.forward).parameters]
        tokens = _tokens(base, dict(zip(names, args, strict=False)) | kwargs)
        pattern = self.pattern(tokens)
        hides = pattern is not None or type(self).pattern_of is not Masked.pattern_of
        self._now = _Pass(tokens, pattern, {}) if hides else None
        if hides and checkpoints(base):
            self._now = None
            raise UserError(
                f"{self.name} cannot work with gradient checkpointing, which calls attention again when "
                "it is not known any more what is hidden; train without it"
            )

    def _end(self, base: nn.Module, args: Any, output: Any) -> None:
        self._now = None

    def _narrow(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        now = self._now
        if now is None:
            return None
        if "attention_mask" not in kwargs:
            raise UserError(f"{type(module).__name__} was called without attention_mask=")
        tokens, given = now.tokens, kwargs["attention_mask"]
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        own = self.pattern_of(module.layer_idx, hidden, tokens)
        pattern = masks.both(now.pattern, own)
        if pattern is None:
            return None
        first, keys = 0, tokens.seen
        if tokens.cache is not None:
            keys, first = tokens.cache.get_mask_sizes(tokens.length, module.layer_idx)
        keys = keys if given is None else given.shape[-1]
        if own is not None:
            seen = _both(pattern, tokens, given, int(first), keys, module)
            return args, kwargs | {"attention_mask": seen}
        key = id(given), int(first), keys  # layers of a kind are given one mask
        if key not in now.made:
            # With the mask itself, whose number another could take over when it is gone.
            now.made[key] = given, _both(pattern, tokens, given, int(first), keys, module)
        return args, kwargs | {"attention_mask": now.made[key][1]}


def _both(
    pattern: Mask, tokens: Tokens, given: Tensor | None, first: int, keys: int, module: nn.Module
) -> Tensor:
    """The model's mask, and the pattern in it, in the form in which attention takes it."""
    q = torch.arange(tokens.offset, tokens.seen, device=tokens.device)
    k = torch.arange(first, first + keys, device=tokens.device)
    seen = masks.at(pattern if given is not None else pattern & masks.causal, q, k)
    if given is not None and given.dtype == torch.bool:
        return given & seen
    if given is None and implementation(module.config) != ADDED:
        return seen
    if given is None:
        given = torch.zeros((), dtype=next(module.parameters()).dtype, device=tokens.device)
    return torch.where(seen, given, torch.finfo(given.dtype).min)


def _tokens(base: nn.Module, given: dict[str, Any]) -> Tokens:
    """What a call of the model tells."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    read = ids if ids is not None else embeds
    if read is None:
        raise UserError("the model was called without input_ids and inputs_embeds")
    cache = the_cache(*(given.get(name) for name in NAMES))
    offset = 0 if cache is None else int(cache.get_seq_length())
    mask, seen = given.get("attention_mask"), offset + read.shape[1]
    flat = isinstance(mask, Tensor) and mask.ndim == 2
    valid = mask[:, :seen].bool() if isinstance(mask, Tensor) and flat else None
    return Tokens(
        batch=read.shape[0], offset=offset, length=read.shape[1], ids=ids,
        valid=None if valid is None or bool(valid.all()) else valid, cache=cache,
        training=base.training, device=read.device,
    )  # fmt: skip


def _attention(model: nn.Module) -> dict[int, nn.Module]:
    """The module of each layer that attends and takes a mask."""
    return {
        layer: found for layer, modules in layers_of(model).items() for found in modules
        if is_attention(found) and takes(found, ("attention_mask",))
    }  # fmt: skip
