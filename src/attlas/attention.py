"""Attention, told in seven stages: project, position, score, mask, normalize, aggregate, output.

    q, k, v = position(project(x))
    weights = normalize(mask(score(q, k)))          softmax(q kᵀ / √d, hidden pairs at −∞)
    y       = output(aggregate(weights, v))         concat_h(weights_h v_h) W_O

A mechanism is a subclass that overrides the stages its paper changes, and nothing else. As long as
`score`, `normalize` and `aggregate` are these here, the three run as one fused call.

Cost: 2·n²·dim multiply-adds for the scores and for the sum, memory linear in n on the fused routes.
Reduces to nothing simpler: the others reduce to it.
Source: "Attention Is All You Need".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from attlas import masks, ops
from attlas.catalog.kinds import LAYER, Kind
from attlas.catalog.registry import mechanism
from attlas.errors import at_least_one
from attlas.inputs import Inputs, MaskLike
from attlas.masks import Mask
from attlas.positions import Position, ScoreMod, named

if TYPE_CHECKING:
    from attlas.hf.caches import Cache

#: What `prepare` gives: queries, keys, values, which pairs may meet, and the inputs.
Prepared = tuple[Tensor, Tensor, Tensor, Mask | Tensor | None, Inputs]


@mechanism("softmax", paper="", aliases=("multi-head-attention", "mha"))
class Attention(nn.Module):
    """Multi-head softmax attention with grouped keys, any mask, any position and a decode cache.

    Args:
        dim: width of the inputs and outputs.
        heads: query heads.
        kv_heads: key and value heads, a divisor of `heads`; as many unless given.
        head_dim: width of a head; dim / heads unless given.
        causal: keys after the query are hidden; False unless that is the mechanism's only form.
        mask: a pattern that always holds, besides `causal`.
        position: a Position, or none, learned, sinusoidal, rope, alibi, t5.
        bias: whether the projections have one.
        dropout: share of weights dropped while training.
        layer_idx: which layer of a shared cache is this one's.

    Raises:
        ValueError: sizes that do not divide, naming the argument.
    """

    kind: ClassVar[Kind] = LAYER
    #: Whether the mechanism has a causal form; without one it cannot decode step by step either.
    has_causal_form: ClassVar[bool] = True
    #: Whether queries may see what comes after them; a recurrence that rewrites its state cannot.
    has_two_sided_form: ClassVar[bool] = True
    #: Whether queries may come from one sequence and keys from another.
    has_cross_form: ClassVar[bool] = True
    #: Whether it brings its own positions, so that `position` is refused.
    has_own_position: ClassVar[bool] = False
    #: Whether a query's weights rest on the queries before it, so that it cannot cross-attend alone.
    needs_earlier_queries: ClassVar[bool] = False
    #: Which masks it can honour: "pairs" any, "padding" real tokens only, "none" no mask at all.
    takes_masks: ClassVar[Literal["pairs", "padding", "none"]] = "pairs"
    #: Whether a cache keeps its keys and values; else it keeps a state that does not grow.
    keeps_keys: bool = True
    #: How the extra memory of a forward pass grows with the length: "linear" or "quadratic".
    memory_law: ClassVar[str] = "linear"
    #: Names of further tensors that `forward` takes by keyword and stages find in `inputs.extras`.
    extras: ClassVar[tuple[str, ...]] = ()
    #: Takes the attention of this layer while its model is attached to, see `attlas.attach.own`.
    door: Any = None
    #: What the last training pass adds to the loss, already weighted; a model sums its layers'.
    auxiliary_loss: Tensor | None = None

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        causal: bool | None = None,
        mask: Mask | None = None,
        position: Position | str | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        self.dim, self.heads = at_least_one("dim", dim), at_least_one("heads", heads)
        self.kv_heads = heads if kv_heads is None else at_least_one("kv_heads", kv_heads)
        if heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads={heads}, got {kv_heads}")
        if head_dim is None and dim % heads:
            raise ValueError(f"heads must divide dim={dim} unless head_dim is given, got {heads}")
        self.head_dim = dim // heads if head_dim is None else at_least_one("head_dim", head_dim)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        causal = not self.has_two_sided_form if causal is None else causal
        if causal and not self.has_causal_form:
            raise ValueError(f"causal=True: {type(self).__name__} has no causal form")
        if not causal and not self.has_two_sided_form:
            raise ValueError(f"causal=False: {type(self).__name__} has no other form than a causal one")
        self._check_mask(mask)
        if position is not None and self.has_own_position:
            name = type(self).__name__
            raise ValueError(f"position: {name} brings its own positions, got {position!r}")
        self.pattern = _combined(masks.causal if causal else None, mask)
        self.causal, self.dropout, self.layer_idx = causal, dropout, layer_idx
        self.scale = self.head_dim**-0.5
        self.position_encoding = (
            named(position, dim=dim, heads=heads, head_dim=self.head_dim)
            if isinstance(position, str) else position or Position()
        )  # fmt: skip
        self.build(bias)

    def build(self, bias: bool) -> None:
        """Make the projections; overridden where their shapes differ."""
        self.q_proj = nn.Linear(self.dim, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(self.dim, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(self.dim, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, self.dim, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "batch queries dim"],
        context: Float[Tensor, "batch keys dim"] | None = None,
        *,
        mask: MaskLike | None = None,
        positions: Integer[Tensor, "*batch queries"] | None = None,
        cache: Cache | None = None,
        **extras: Tensor,
    ) -> Float[Tensor, "batch queries dim"]:
        """Attend from x to itself, or to `context`.

        Args:
            x: inputs of the queries.
            context: inputs of the keys and values; x unless given.
            mask: a pattern; True at real tokens [batch, keys, cached ones included]; or pair by pair
                [batch, heads, queries, keys].
            positions: of x's tokens; from the cache and the padding unless given.
            cache: a Transformers cache, extended by x's keys and values.
            extras: what the mechanism declares as its `extras`.

        Raises:
            ValueError: inputs of another width, a context where there is no cross form or with a
                cache, a mask of another shape, a cache without a causal form.
            TypeError: a keyword that is none of its `extras`.
        """
        q, k, v, pairs, inputs = self.prepare(x, context, mask, positions, cache, **extras)
        if self.door is not None:
            return self.output(self.door(self, q, k, v, inputs), inputs)
        return self.output(self.attend(q, k, v, pairs, inputs), inputs)

    def prepare(
        self, x: Tensor, context: Tensor | None = None, mask: MaskLike | None = None,
        positions: Tensor | None = None, cache: Cache | None = None, **extras: Tensor,
    ) -> Prepared:  # fmt: skip
        """The stages before the scores: q, k, v, which pairs may meet, and what was given."""
        self._check(x, context, mask, cache, extras)
        seen = 0 if cache is None else int(cache.get_seq_length(self.layer_idx))
        real = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        tokens = x if context is None else context
        if real is not None and real.shape != (x.shape[0], seen + tokens.shape[1]):
            raise ValueError(
                f"mask must be [batch, keys] = {[x.shape[0], seen + tokens.shape[1]]}, "
                f"got {list(real.shape)}"
            )
        key_positions = _positions(seen, tokens, real)
        if positions is None:
            own = context is None
            positions = key_positions[..., seen:] if own else _positions(0, x, None)
        embed = self.position_encoding.embed
        x = embed(x, positions)
        if context is not None:
            context = embed(context, key_positions)
        inputs = Inputs(x, context, positions, key_positions, mask, cache, self.layer_idx, extras)
        q, k, v = self.project(inputs)
        q, k = self.position(q, k, inputs)
        if cache is not None and not self.keeps_keys:
            inputs.advance()
        elif cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
            length = int(cache.get_seq_length(self.layer_idx))
            k, v = k[:, :, :length], v[:, :, :length]  # a static cache gives its empty slots too
        # A cache that lets go of tokens is masked where it is read.
        pairs = None if self.door is not None else self.mask(q, k, inputs)
        return q, k, v, pairs, inputs

    def init_cache(self) -> Cache:
        """An empty Transformers cache for step-by-step decoding.

        Raises:
            ValueError: the mechanism has no causal form.
        """
        from attlas.hf.caches import DynamicCache

        if not self.has_causal_form:
            raise ValueError(f"{type(self).__name__} has no causal form, so it cannot decode")
        return DynamicCache()

    # The seven stages -----------------------------------------------------------------------------

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [batch, heads, tokens, head_dim]."""
        q, tokens = self.q_proj(inputs.x), inputs.tokens
        k, v = self.k_proj(tokens), self.v_proj(tokens)
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)

    def split_heads(
        self, x: Float[Tensor, "batch tokens joined"]
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """What stands side by side in each token, as heads of `head_dim` channels."""
        return rearrange(x, "b t (h d) -> b h t d", d=self.head_dim)

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Queries and keys that know where they stand; k holds this pass's own keys."""
        rotate = self.position_encoding.rotate
        return rotate(q, inputs.positions), rotate(k, inputs.token_positions)

    @property
    def score_mod(self) -> ScoreMod | None:
        """Pointwise change of the scores, as FlexAttention takes it; the position encoding's."""
        return self.position_encoding.score_mod

    def score(
        self,
        q: Float[Tensor, "batch heads queries width"],
        k: Float[Tensor, "batch kv_heads keys width"],
    ) -> Float[Tensor, "batch heads queries keys"]:
        """Scores of all pairs, before `score_mod`."""
        q, k = self.features(q, k)
        return ops.grouped_product(q * self.scale, k.transpose(-1, -2))

    def features(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as the score multiplies them; changing them keeps the fused call."""
        return q, k

    def mask(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> Mask | Bool[Tensor, "b h queries keys"] | None:
        """Which pairs may meet: the layer's own pattern and what the caller gave."""
        given, real = inputs.mask, inputs.real
        if not isinstance(given, Tensor):
            return _combined(self.pattern, given)
        if real is None:
            return _and(masks.dense(self.pattern, q.shape[2], k.shape[2], device=q.device)
                        if self.pattern else None, given)  # fmt: skip
        # The last keys, should a sliding cache have let go of earlier ones.
        real = real[:, -k.shape[2] :]
        if self.pattern is None or self.pattern.relative:
            return _combined(self.pattern, masks.padding(real))
        at = masks.at(self.pattern, inputs.positions, inputs.key_positions[..., -k.shape[2] :])
        return at & real[:, None, None, :]

    def normalize(
        self, scores: Float[Tensor, "batch heads queries keys"]
    ) -> Float[Tensor, "batch heads queries keys"]:
        """Weights from scores whose hidden pairs are −∞."""
        return ops.softmax(scores)

    def aggregate(
        self,
        weights: Float[Tensor, "batch heads queries keys"],
        v: Float[Tensor, "batch kv_heads keys width"],
    ) -> Float[Tensor, "batch heads queries width"]:
        """One vector for each head and query."""
        weights = torch.dropout(weights, self.dropout, self.training)
        return ops.grouped_product(weights, v)

    def output(
        self, heads: Float[Tensor, "batch heads queries width"], inputs: Inputs
    ) -> Float[Tensor, "batch queries dim"]:
        """Heads joined and projected."""
        y: Tensor = self.o_proj(rearrange(heads, "b h t d -> b t (h d)"))
        return y

    # Between them ---------------------------------------------------------------------------------

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries width"]:
        """score → mask → normalize → aggregate: one fused call unless a subclass changes them."""
        changed = (getattr(type(self), s) is not getattr(Attention, s) for s in _FUSED)
        if any(changed):
            return self.aggregate(self.weigh(q, k, mask, inputs), v)
        return self.fused(*self.features(q, k), v, mask)

    def fused(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None
    ) -> Float[Tensor, "batch heads queries width"]:
        """Softmax attention in one call, with the layer's scale, change of scores and dropout."""
        return ops.attend(
            q, k, v, mask=mask, score_mod=self.score_mod, scale=self.scale,
            dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip

    def weigh(
        self, q: Tensor, k: Tensor, mask: Mask | Tensor | None, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries keys"]:
        """score → mask → normalize, with all pairs in memory."""
        scores = self.score(q, k)
        offset = k.shape[2] - q.shape[2]
        if self.score_mod is not None:
            scores = self.score_mod(scores, *ops.indices(scores, offset))
        visible = ops.as_dense(mask, q.shape[2], k.shape[2], offset, q.device)
        return self.normalize(
            scores if visible is None else scores.masked_fill(~visible, -torch.inf)
        )

    def weights(
        self,
        x: Float[Tensor, "batch queries dim"],
        context: Float[Tensor, "batch keys dim"] | None = None,
        *,
        mask: MaskLike | None = None,
        positions: Integer[Tensor, "*batch queries"] | None = None,
        **extras: Tensor,
    ) -> Float[Tensor, "batch heads queries keys"]:
        """The attention map that `forward` sums the values with."""
        q, k, _, pairs, inputs = self.prepare(x, context, mask, positions, **extras)
        return self.weigh(q, k, pairs, inputs)

    def adopt(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Take over a plain layer's weights where names and shapes fit; the rest stays as it is.

        Returns:
            Names of the parameters that are new: not among `weights`, or of another shape there.
        """
        own = self.state_dict()
        fitting = {n: w for n, w in weights.items() if n in own and own[n].shape == w.shape}
        self.load_state_dict(fitting, strict=False)
        return [name for name in own if name not in fitting]

    def per_query_head(self, x: Tensor, like: Tensor) -> Tensor:
        """Keys or values with each group's repeated for its query heads."""
        return ops.repeated(x, like.shape[1])

    def runs_along(self, mask: Mask | Tensor | None, inputs: Inputs) -> bool:
        """Whether nothing but causality and padding hides pairs, so that running sums over the keys
        tell what each query sees."""
        own = self.pattern in (None, masks.causal)
        return mask in (None, masks.causal) if inputs.real is None else own

    def extra_repr(self) -> str:
        """Sizes and pattern."""
        shown = f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"
        return shown if self.pattern is None else f"{shown}, mask={self.pattern!r}"

    def _check(
        self, x: Tensor, context: Tensor | None, mask: MaskLike | None, cache: Cache | None,
        extras: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        name = type(self).__name__
        unknown = sorted(set(extras) - set(self.extras))
        if unknown:
            takes = f"takes {list(self.extras)}" if self.extras else "takes no extras"
            raise TypeError(f"{name} {takes}, got {unknown[0]!r}")
        for what, tokens in (("x", x), ("context", context)):
            if tokens is not None and (tokens.ndim != 3 or tokens.shape[-1] != self.dim):
                raise ValueError(
                    f"{what} must be [batch, tokens, {self.dim}], got {list(tokens.shape)}"
                )
        if context is not None and (cache is not None or self.causal or not self.has_cross_form):
            why = "a cache" if cache is not None else "causal=True" if self.causal else name
            raise ValueError(f"context cannot be given together with {why}")
        if context is not None and self.position_encoding.score_mod is not None:
            position = type(self.position_encoding).__name__
            raise ValueError(
                f"context cannot be given together with position={position}: distances between two "
                "sequences mean nothing"
            )
        if cache is not None and not self.has_causal_form:
            raise ValueError(f"cache was given, but {name} has no causal form")
        self._check_mask(mask)
        if isinstance(mask, Tensor) and mask.ndim not in (2, 4):
            raise ValueError(f"mask must have 2 or 4 axes, got {list(mask.shape)}")
        if mask is not None and not isinstance(mask, Mask | Tensor):
            raise TypeError(f"mask takes a Mask or a boolean tensor, got {type(mask).__name__}")

    def _check_mask(self, mask: MaskLike | None) -> None:
        patterns = (None, masks.causal) if self.has_causal_form else (None,)
        per_pair = mask.ndim == 4 if isinstance(mask, Tensor) else mask not in patterns
        refused = per_pair if self.takes_masks == "padding" else mask is not None
        if self.takes_masks != "pairs" and refused:
            takes = "only padding, [batch, keys]" if self.takes_masks == "padding" else "none"
            raise ValueError(f"mask: {type(self).__name__} takes {takes}, got {mask!r}")


#: The stages that one fused call stands for.
_FUSED = ("score", "normalize", "aggregate", "weigh")


def _combined(a: Mask | None, b: Mask | None) -> Mask | None:
    return a & b if a is not None and b is not None else a if b is None else b


def _and(a: Tensor | None, b: Tensor) -> Tensor:
    return b.bool() if a is None else a & b.bool()


def _positions(seen: int, tokens: Tensor, real: Tensor | None) -> Tensor:
    """Positions of the cached and the new tokens; padding does not count."""
    if real is not None:
        return (real.long().cumsum(-1) - 1).clamp(min=0)
    return torch.arange(seen + tokens.shape[1], device=tokens.device)
