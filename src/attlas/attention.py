"""Attention, told in seven stages: project, position, score, mask, normalize, aggregate, output.

    q, k, v = position(project(x))
    weights = normalize(mask(score(q, k)))          softmax(q kᵀ / √d, hidden pairs at −∞)
    y       = output(aggregate(weights, v))         concat_h(weights_h v_h) W_O

A mechanism is a subclass that overrides the stages its paper changes, and nothing else. Every stage is
given what the stage before it made, and `inputs`: the tokens, their positions, masks and cache. As long
as `score`, `normalize` and `aggregate` are these here, the three run as one fused call.

Cost: 2·n²·dim multiply-adds for the scores and for the sum, memory linear in n on the fused routes.
Reduces to nothing simpler: the others reduce to it.
Source: "Attention Is All You Need".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn

from attlas import masks, ops
from attlas.catalog.kinds import LAYER, Kind
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs, MaskLike
from attlas.masks import Mask
from attlas.network import Network
from attlas.options import Configured, option
from attlas.positions import Position, ScoreMod, encoding_of
from attlas.queries import in_blocks
from attlas.supports import Supports, share_of_dim

if TYPE_CHECKING:
    from attlas.hf.caches import Cache


@mechanism("softmax", paper="", aliases=("multi-head-attention", "mha"))
class Attention(Configured, Network):
    """Multi-head softmax attention with grouped keys, any mask, any position and a decode cache."""

    kind: ClassVar[Kind] = LAYER
    supports: ClassVar[Supports] = Supports()
    #: Stages changed that no overridden method tells; "stage: why", of stages that the paper leaves.
    changes: ClassVar[tuple[str, ...]] = ()
    beyond: ClassVar[tuple[str, ...]] = ()
    MIDDLE: ClassVar[tuple[str, ...]] = ("score", "normalize", "aggregate", "weigh")
    dim: int = option("width of the inputs and outputs", at_least=1, kw_only=False)
    heads: int = option("query heads", default=8, at_least=1, kw_only=False)
    kv_heads: int = option(
        "key and value heads, a divisor of heads; as many unless given", kw_only=False, at_least=1,
        factory=lambda layer: layer.heads,
    )  # fmt: skip
    head_dim: int = option(
        "width of a head; dim / heads unless given", factory=share_of_dim, kw_only=False, at_least=1
    )
    causal: bool = option(
        "keys after the query are hidden; unless given, False if the mechanism can see them",
        factory=lambda layer: not layer.supports.bidirectional,
    )
    own_mask: Mask | None = option("a pattern besides causal", default=None, alias="mask")
    own_position: Position | str | None = option(
        "a Position, or none, learned, sinusoidal, rope, alibi, t5", default=None, alias="position"
    )
    bias: bool = option("whether the projections have one", default=False)
    dropout: float = option("weights dropped while training", default=0.0, at_least=0, below=1)
    layer_idx: int = option("which layer of a shared cache is this one's", default=0)

    def setup(self) -> None:
        """Check how the options go together, and make the projections."""
        self.context_width = int(getattr(self, "context_dim", self.dim))  # where context is given
        self.supports.check_made(self)
        self.pattern = masks.both(masks.causal if self.causal else None, self.own_mask)
        self.scale = self.head_dim**-0.5
        self.position_encoding = encoding_of(self.own_position, self)
        #: Whether score, normalize and aggregate are these here, and so one call.
        self.fuses = all(getattr(type(self), s) is getattr(Attention, s) for s in self.MIDDLE)
        #: Takes the attention of this layer while its model is attached to, see `attlas.attach.own`.
        self.door: Any = None
        self.make_projections()

    def make_projections(self) -> None:
        """Make the projections; overridden where their shapes differ."""
        self.q_proj = nn.Linear(self.dim, self.heads * self.head_dim, bias=self.bias)
        self.k_proj = nn.Linear(self.dim, self.kv_heads * self.head_dim, bias=self.bias)
        self.v_proj = nn.Linear(self.dim, self.kv_heads * self.head_dim, bias=self.bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, self.dim, bias=self.bias)

    def forward(
        self, x: Float[Tensor, "batch queries dim"],
        context: Float[Tensor, "batch keys context_dim"] | None = None, *, mask: MaskLike | None = None,
        positions: Integer[Tensor, "*batch queries"] | None = None, cache: Cache | None = None,
        **extras: Tensor,
    ) -> Float[Tensor, "batch queries dim"]:  # fmt: skip
        """Attend from x to itself, or to `context`.

        Args:
            x: inputs of the queries.
            context: inputs of the keys and values; x unless given.
            mask: a pattern; True at valid tokens [batch, keys, cached ones included]; or pair by pair
                [batch, heads, queries, keys]. Floats as added to scores: 0 seen, −∞ hidden.
            positions: of x's tokens; from the cache and the padding unless given.
            cache: a Transformers cache, extended by x's keys and values.
            extras: the tensors that the mechanism `supports` as its extras.

        Raises:
            ValueError: what the mechanism does not support, or what is of another shape.
            TypeError: a keyword that is none of its extras.
        """
        q, k, v, inputs = self.prepare(x, context, mask, positions, cache, extras)
        attend = self.attend if self.door is None else self.door
        return self.output(attend(q, k, v, inputs), inputs)

    def prepare(
        self, x: Tensor, context: Tensor | None = None, mask: MaskLike | None = None,
        positions: Tensor | None = None, cache: Cache | None = None,
        extras: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Inputs]:  # fmt: skip
        """What stands before the scores: queries, all keys and values, and which pairs may meet."""
        inputs = Inputs.of(self, self.position_encoding, x, context, mask, positions, cache, extras)
        q, k, v = self.project(inputs)
        q, k = self.position(q, k, inputs)
        k, v = self.restore(*inputs.extend(k, v, self.keeps_keys), inputs)
        # A cache that lets go of tokens is masked where it is read.
        inputs.pairs = None if self.door is not None else self.mask(q, k, inputs)
        return q, k, v, inputs

    @property
    def keeps_keys(self) -> bool:
        """Whether a cache keeps its keys and values; else it keeps a state that does not grow."""
        return self.supports.cache == "keys"

    def init_cache(self) -> Cache:
        """An empty Transformers cache for step-by-step decoding.

        Raises:
            ValueError: the mechanism has no causal form.
        """
        from attlas.hf.caches import DynamicCache

        if not self.supports.causal:
            raise ValueError(f"{type(self).__name__} has no causal form, so it cannot decode")
        return DynamicCache()

    # The seven stages -----------------------------------------------------------------------------

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [batch, heads, tokens, head_dim]."""
        q, k, v = self.q_proj(inputs.x), self.k_proj(inputs.tokens), self.v_proj(inputs.tokens)
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)

    def split_heads(
        self, x: Float[Tensor, "batch tokens joined"]
    ) -> Float[Tensor, "batch heads tokens head_dim"]:
        """What stands side by side in each token, as heads of `head_dim` channels."""
        batch, tokens, joined = x.shape
        return x.reshape(batch, tokens, joined // self.head_dim, self.head_dim).transpose(1, 2)

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Queries and keys that know where they stand; k holds this pass's own keys."""
        return self.position_encoding.rotate_both(q, k, inputs.positions, inputs.token_positions)

    def restore(self, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """All keys and values, cached ones included, where they are not those that a cache keeps."""
        return k, v

    @property
    def score_mod(self) -> ScoreMod | None:
        """Pointwise change of the scores, as FlexAttention takes it; the position encoding's."""
        return self.position_encoding.score_mod

    def score(
        self, q: Float[Tensor, "batch heads queries width"],
        k: Float[Tensor, "batch kv_heads keys width"], inputs: Inputs,
    ) -> Float[Tensor, "batch heads queries keys"]:  # fmt: skip
        """Scores of all pairs, before `score_mod`."""
        q, k = self.features(q, k, inputs)
        return ops.grouped_product(q * self.scale, k.transpose(-1, -2))

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Queries and keys as the score multiplies them; changing them keeps the fused call."""
        return q, k

    def mask(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> Mask | Bool[Tensor, "b h queries keys"] | None:
        """Which pairs may meet: the layer's own pattern and what the caller gave."""
        return inputs.within(self.pattern, q, k)

    def normalize(
        self, scores: Float[Tensor, "batch heads queries keys"], inputs: Inputs
    ) -> Float[Tensor, "batch heads queries keys"]:
        """Weights from scores whose hidden pairs are −∞."""
        return ops.softmax(scores)

    def aggregate(
        self, weights: Float[Tensor, "batch heads queries keys"],
        v: Float[Tensor, "batch kv_heads keys width"], inputs: Inputs,
    ) -> Float[Tensor, "batch heads queries width"]:  # fmt: skip
        """One vector for each head and query."""
        weights = torch.dropout(weights, self.dropout, self.training)
        return ops.grouped_product(weights, v)

    def output(
        self, heads: Float[Tensor, "batch heads queries width"], inputs: Inputs
    ) -> Float[Tensor, "batch queries dim"]:
        """Heads joined and projected."""
        y: Tensor = self.o_proj(heads.transpose(1, 2).flatten(2))
        return y

    # Between them ---------------------------------------------------------------------------------

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """score → mask → normalize → aggregate: one fused call unless a subclass changes them."""
        if not self.fuses:
            return in_blocks(self, q, k, v, inputs)
        return self.fused(*self.features(q, k, inputs), v, inputs)

    def fused(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries width"]:
        """Softmax attention in one call, with the layer's scale, change of scores and dropout."""
        return ops.attend(
            q, k, v, mask=inputs.pairs, score_mod=inputs.by_positions(self.score_mod, k.shape[2]),
            scale=self.scale, dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip

    def weigh(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries keys"]:
        """score → mask → normalize, with all pairs in memory."""
        scores = self.score(q, k, inputs)
        if (change := inputs.by_positions(self.score_mod, k.shape[2])) is not None:
            scores = change(scores, *ops.indices(scores, k.shape[2] - q.shape[2]))
        visible = inputs.visible(q, k)
        hidden = scores if visible is None else scores.masked_fill(~visible, -torch.inf)
        return self.normalize(hidden, inputs)

    def weights(
        self, x: Float[Tensor, "batch queries dim"],
        context: Float[Tensor, "batch keys context_dim"] | None = None, *, mask: MaskLike | None = None,
        positions: Integer[Tensor, "*batch queries"] | None = None, **extras: Tensor,
    ) -> Float[Tensor, "batch heads queries keys"]:  # fmt: skip
        """The attention map that `forward` sums the values with."""
        q, k, _, inputs = self.prepare(x, context, mask, positions, extras=extras)
        return self.weigh(q, k, inputs)

    def load_from(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Take over a plain layer's weights where names and shapes fit; tells which others stay."""
        own = self.state_dict()
        fitting = {n: w for n, w in weights.items() if n in own and own[n].shape == w.shape}
        self.load_state_dict(fitting, strict=False)
        return [name for name in own if name not in fitting]

    def extra_repr(self) -> str:
        """Sizes and pattern."""
        sizes = (f"{n}={getattr(self, n)}" for n in ("dim", "heads", "kv_heads", "head_dim"))
        return ", ".join([*sizes, *([f"mask={self.pattern!r}"] if self.pattern else [])])
