"""What a forward pass was given, for every stage to look at, and what it remembers for the next one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Integer, Shaped
from torch import Tensor
from torch.nn.functional import pad

from attlas import masks, ops
from attlas.errors import UserError
from attlas.folding import folded, unfolded
from attlas.masks import Mask
from attlas.places import agree, counted, in_order, one_number
from attlas.positions import Position, Positioned, ScoreMod
from attlas.positions.base import by_distance
from attlas.remembering import Unasked, alone, layer_of, with_states
from attlas.supports import Form
from attlas.tracing import traced

if TYPE_CHECKING:
    from attlas.hf.caches import Cache

#: What a layer's `mask` argument takes: a pattern; True at valid tokens; or pair by pair. Tensors may be
#: of integers or of floats too, see `masks.seen`.
MaskLike = Mask | Shaped[Tensor, "batch keys"] | Shaped[Tensor, "b h #queries keys"]


@dataclass
class Inputs:
    """What every stage of one forward pass may read besides what the stage before it gave.

    Attributes:
        x: inputs of the queries, with absolute positions added where the layer has them.
        context: inputs of the keys and values; x where there is none.
        positions: of x's tokens.
        key_positions: of the keys, cached ones included.
        mask: as the caller gave it, tensors as booleans.
        cache: the Transformers cache that this pass extends.
        layer_idx: which of the cache's layers is this layer's.
        extras: further tensors, by the names that the mechanism `supports`.
        pairs: which pairs may meet: what the `mask` stage gave, None where all may.
        carried: data of each key beside it, see `carry`.
        notes: what an earlier stage left for a later one of this pass, by name.
        given: the caller told the positions of x's tokens.
    """

    x: Float[Tensor, "batch queries dim"]
    context: Float[Tensor, "batch keys context_dim"] | None
    positions: Integer[Tensor, "... queries"]
    key_positions: Integer[Tensor, "... all_keys"]
    mask: MaskLike | None = None
    cache: Cache | None = None
    layer_idx: int = 0
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    pairs: Mask | Tensor | None = None
    carried: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Tensor] = field(default_factory=dict)
    given: bool = False

    @classmethod
    def of(
        cls, layer: Form, encoding: Position, x: Tensor, context: Tensor | None, mask: MaskLike | None,
        positions: Tensor | None, cache: Cache | None,
        extras: Mapping[str, Tensor] | None = None,
    ) -> Inputs:  # fmt: skip
        """What a layer was called with, checked; positions are told, and absolute ones added.

        Raises:
            ValueError: something that the layer does not support, or of another shape.
            TypeError: an unknown extra, or a mask that is none.
        """
        extras = extras or {}
        layer.supports.check_call(layer, encoding, x, context, mask, cache, extras)
        mask = masks.seen(mask) if isinstance(mask, Tensor) else mask
        layer_idx, embed = layer.layer_idx, encoding.embed
        recorded = cache is not None and getattr(cache, "recorded", False)
        seen = 0 if cache is None or recorded else int(cache.get_seq_length(layer_idx))
        valid = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        tokens = x if context is None else context
        if valid is not None and valid.shape != (x.shape[0], seen + tokens.shape[1]):
            raise ValueError(
                f"mask must be [batch, keys] = {[x.shape[0], seen + tokens.shape[1]]}, "
                f"got {list(valid.shape)}"
            )
        key_positions: Any = in_order(seen, tokens, valid) if not recorded else Unasked(
            lambda: cache.layers[layer_idx].places()  # type: ignore[union-attr]
        )
        given = positions is not None
        if positions is None:
            own = key_positions if context is None else counted(x.shape[1], x.device)
            positions = own if seen == 0 else own[..., seen:]
        x = embed(x, positions)
        context = None if context is None else embed(context, key_positions)
        made = cls(
            x, context, positions, key_positions, mask, cache, layer_idx, extras, given=given
        )  # fmt: skip
        if given and layer.supports.counts and context is None:
            made.check_order(type(layer).__name__)
        if not layer.supports.gaps and valid is not None and not traced() and made.gaps:
            raise UserError(
                f"mask: {type(layer).__name__} reads the neighbours of a token, so that padding may "
                "stand before or behind the tokens of a row, not between them"
            )
        return made

    @property
    def tokens(self) -> Tensor:
        """What keys and values are made of."""
        return self.x if self.context is None else self.context

    @property
    def token_positions(self) -> Tensor:
        """Positions of `tokens`."""
        return self.positions if self.context is None else self.key_positions

    @property
    def told(self) -> bool:
        """Whether tokens may stand elsewhere than at the numbers of their slots."""
        return self.given or self.valid is not None or self.recall("positions") is not None

    @property
    def gaps(self) -> bool:
        """Whether padding stands, or under compilation may stand, between the tokens of a row."""
        if self.valid is None or traced():
            return self.valid is not None
        starts = self.valid & ~pad(self.valid, (1, -1))
        return bool((starts.sum(-1) > 1).any())

    def check_order(self, name: str) -> None:
        """Refuse positions other than those of the tokens' order, but for where they begin.

        Raises:
            ValueError: a layer called `name` counts tokens by itself.
        """
        tokens = self.positions.shape[-1]
        if tokens == 1 or traced():
            return
        if not one_number(self.positions - self.key_positions[..., -tokens:], self.valid_now):
            raise UserError(
                f"positions: {name} counts tokens by their order, so that they must follow one another "
                "in each row; leave them out, or give a row to each text"
            )

    def by_positions(self, change: ScoreMod | None, keys: int) -> ScoreMod | None:
        """A change of scores that is made for positions, on the slots of this pass and its keys."""
        if change is None or getattr(change, "placeless", False):
            return change
        self.check_places(keys)
        if not self.told:
            return change
        at, of = self.positions, self.positions_of(keys)
        if at.shape[-1] == 1 or traced():  # a lone query's is never compiled for
            return Positioned(change, at, of)
        slots = torch.arange(keys, device=of.device)
        last = slots[keys - at.shape[-1] :]
        if agree(at, last) and agree(of, slots):
            return change
        as_far = by_distance(change) is not None and self._moved(at - last, of - slots)
        return change if as_far else Positioned(change, at, of)

    def check_places(self, keys: int) -> None:
        """Refuse to ask where `keys` keys stand of which a cache policy has left some out.

        Raises:
            ValueError: it has, and no session of its model knows which.
        """
        layer = layer_of(self.cache, self.layer_idx)
        if getattr(layer, "index", None) is not None and keys < self.key_positions.shape[-1]:
            raise UserError(
                "cache: a policy has left some keys out, and where those stand that are there the model "
                "alone cannot tell; go on inside attach(model, ...)"
            )

    def _moved(self, at: Tensor, of: Tensor) -> bool:
        """Whether a row's tokens are all moved from their slots by one number; `at` and `of` tell it."""
        moved = torch.cat([x.expand(len(self.x), -1) for x in (at, of)], dim=-1)
        if (valid := self.valid) is None:
            return one_number(moved, None)
        own = self.context is None
        asks = valid[:, -at.shape[-1] :] if own else torch.ones_like(at, dtype=torch.bool)
        shown = torch.cat((asks.expand(len(valid), -1), valid[:, -of.shape[-1] :]), dim=-1)
        return one_number(moved, shown)

    def positions_of(self, keys: int) -> Tensor:
        """Where the last `keys` keys stand: cached ones and `tokens` as they were told."""
        if isinstance(self.key_positions, Unasked):
            return self.key_positions.places()
        new = self.token_positions
        old = self._earlier(new)
        rows = torch.broadcast_shapes(old.shape[:-1], new.shape[:-1])
        return torch.cat((old.expand(*rows, -1), new.expand(*rows, -1)), dim=-1)[..., -keys:]

    def _earlier(self, new: Tensor) -> Tensor:
        """Where cached keys stand: by their order, unless other positions were told, which the cache then
        keeps.

        Raises:
            ValueError: a cache that has no room for them.
        """
        seen = self.key_positions.shape[-1] - new.shape[-1]
        old, here = self.key_positions[..., :seen], self.key_positions[..., seen:]
        before = self.recall("positions")
        if self.cache is None or (before is None and not self.given):
            return old
        if before is None and (traced() or agree(new, here)):
            return old
        before = old if before is None else before[..., : old.shape[-1]]
        self.remember("positions", torch.cat([x.expand(len(self.x), -1) for x in (before, new)], dim=-1))
        return before

    @property
    def valid(self) -> Bool[Tensor, "batch all_keys"] | None:
        """True at tokens, False at padding, cached ones included; None without padding."""
        per_token = isinstance(self.mask, Tensor) and self.mask.ndim == 2
        return self.mask if per_token else None  # type: ignore[return-value]

    @property
    def valid_now(self) -> Bool[Tensor, "batch keys"] | None:
        """`valid` at this pass's own tokens."""
        return None if self.valid is None else self.valid[:, -self.tokens.shape[1] :]

    def within(self, pattern: Mask | None, q: Tensor, k: Tensor) -> Mask | Tensor | None:
        """The caller's mask within a layer's own pattern."""
        given, queries, keys = self.mask, q.shape[2], k.shape[2]
        causal = (None, masks.causal)
        if isinstance(given, Tensor) or given not in causal or pattern not in causal:
            self.check_places(keys)
        if not isinstance(given, Tensor):
            return self.placed(masks.both(pattern, given), queries, keys)
        pattern, valid = self.placed(pattern, queries, keys), self.valid
        if valid is None:
            own = None if pattern is None else masks.dense(pattern, queries, keys, device=q.device)
            wanted, got = (len(q), queries, keys), (given.shape[0], *given.shape[2:])
            if any(size not in (1, want) for want, size in zip(wanted, got, strict=True)):
                raise ValueError(
                    f"mask must be [batch, heads, queries, keys] = [{len(q)}, …, {queries}, {keys}], or "
                    f"1 where all are alike, got {list(given.shape)}"
                )
            given = given.expand(-1, -1, queries, keys)
            return given if own is None else own & given
        # The last keys, should a sliding cache have let go of earlier ones.
        valid = valid if valid.shape[1] == keys else valid[:, -keys:]
        relative = pattern is None or pattern.relative
        if pattern in causal or (relative and not self.gaps):
            return masks.both(pattern, masks.padding(valid))
        # Distances of a pattern are counted in tokens, among which padding is none.
        mine = self.key_positions if relative and self.context is None else self.positions
        at = masks.at(pattern, mine[..., -queries:], self.key_positions[..., -keys:])
        return at & valid[:, None, None, :]

    def placed(self, pattern: Mask | None, queries: int, keys: int) -> Mask | None:
        """The pattern for queries of which the last stands at the last key; of two sequences, each counts
        its own tokens, so that row i of a table is query i."""
        if pattern is None or self.context is None or queries == keys:
            return pattern
        return masks.Shifted(pattern, queries - keys)

    def visible(self, q: Tensor, k: Tensor) -> Bool[Tensor, "b h queries keys"] | None:
        """`pairs` for these queries and keys as booleans; None where all may meet."""
        queries, keys = q.shape[2], k.shape[2]
        return ops.as_dense(self.pairs, queries, keys, keys - queries, q.device)

    def runs_along(self, pattern: Mask | None) -> bool:
        """Whether nothing but causality and padding hides pairs in a layer of this `pattern`, so that
        running sums over the keys tell what each query sees."""
        return (pattern if self.valid is not None else self.pairs) in (None, masks.causal)

    def looks_back(self, pattern: Mask | None) -> bool:
        """Whether this call is causal, by a layer's pattern or by the call's mask."""
        return masks.causal in (pattern, self.pairs)

    def refuse_weights(self, taken_in: bool) -> None:
        """Refuse to tell the weights of tokens that a state has taken in.

        Raises:
            ValueError: there are such tokens.
        """
        if taken_in:
            raise ValueError("cache: the weights of tokens that a state has taken in are not known")

    def carry(self, name: str, x: Float[Tensor, "batch heads tokens width"]) -> None:
        """Give each of this pass's keys data beside it, to be found in `carried` after `position`.

        A cache keeps it with the key; then `carried[name]` tells of the cached keys too. Heads are as
        many as the keys', a multiple of them, or one.
        """
        self.carried[name] = x

    def extend(self, k: Tensor, v: Tensor, keeps_keys: bool) -> tuple[Tensor, Tensor]:
        """All keys and values, the cache having taken in this pass's, and what they carry.

        Args:
            k: this pass's keys.
            v: this pass's values.
            keeps_keys: False for a layer whose cache is a state, which only counts tokens.
        """
        if self.cache is None:
            return k, v
        if not keeps_keys:
            self.advance()
            return k, v
        # What is carried lies behind the values, and heads are as many as the fewer of both, so that
        # every cache of Transformers can hold it.
        counts = k.shape[1], v.shape[1]
        heads, sides = min(counts), dict(self.carried)
        packed = [folded(v, heads), *(folded(x, heads).to(v.dtype) for x in sides.values())]
        values = torch.cat(packed, dim=-1) if sides else packed[0]
        k, v = self.cache.update(folded(k, heads), values, self.layer_idx)
        if getattr(self.cache, "recorded", False):
            if not self.cache.layers[self.layer_idx].latent:
                return alone(k, v, sides)
        else:
            length = int(self.cache.get_seq_length(self.layer_idx))
            if traced() or k.shape[2] > length:  # a static cache gives its empty slots too
                k, v = k[:, :, :length], v[:, :, :length]
        if sides:
            v, *behind = v.split([x.shape[-1] for x in packed], dim=-1)
            for (name, x), each in zip(sides.items(), behind, strict=True):
                self.carried[name] = unfolded(each, x.shape[1]).to(x.dtype)
        return unfolded(k, counts[0]), unfolded(v, counts[1])

    def recall(self, name: str) -> Tensor | None:
        """What the pass before this one remembered under `name`; None at the beginning."""
        return getattr(layer_of(self.cache, self.layer_idx), "states", {}).get(name)

    def remember(self, name: str, value: Tensor) -> None:
        """Keep a tensor, its batch first, for the next pass with this cache; nothing without one.

        Raises:
            ValueError: a cache whose layers cannot hold more than keys and values.
        """
        if self.cache is not None:
            with_states(self.cache, self.layer_idx).states[name] = value

    def advance(self) -> None:
        """Count this pass's tokens as seen, in a cache that keeps no keys of them.

        Raises:
            ValueError: a cache whose layers cannot hold more than keys and values.
        """
        if self.cache is not None:
            with_states(self.cache, self.layer_idx).seen += self.x.shape[1]
