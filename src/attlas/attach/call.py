"""What parts see (`Step`, `Call`) and what they may do (`Part`, `Recorder`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attlas.catalog.kinds import RECORD, SELECT, Kind
from attlas.errors import UserError
from attlas.positions import ScoreMod
from attlas.storage.layer import Chosen


@dataclass(slots=True)
class Step:
    """One forward call of the model.

    Attributes:
        cache: the Transformers cache in use, None without one.
        real: which of the tokens seen so far are no padding; None when all are.
        positions: the position ids given with the call, None when the model counts them itself.
        offset: tokens that the cache had seen before this call.
        length: tokens of this call; 0 when the model takes no tokens (images).
        chunked: the session was told that the prompt comes in several calls.
        ids: the token ids of this call, None when the model is given embeddings or images.
        hidden: what the attention module under way was given, by module; filled when a part
            `wants_hidden`.
        shared: what parts work out once for all layers of the call.
    """

    cache: Any = None
    real: Bool[Tensor, "batch seen"] | None = None
    positions: Int[Tensor, "*rows query"] | None = None
    offset: int = 0
    length: int = 0
    chunked: bool = False
    ids: Int[Tensor, "batch query"] | None = None
    hidden: dict[nn.Module, Tensor] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Call:
    """One layer's attention in one forward call, handed to every part.

    Keys stand in slots: slot s of a cache that dropped tokens holds the token of column
    `columns[..., s]` of the original sequence; without such a cache slot and column are the same.

    Attributes:
        layer: index of the layer.
        module: the model's attention module.
        q: queries, rotated where the model rotates them.
        k: keys in the cache, those of this call last; not repeated for grouped heads. Where the cache
            holds them encoded and no part needs to see them, those of this call alone.
        v: values likewise.
        scaling: factor of q·k.
        mask: which slots each query may attend (True = may), None for all or, with `is_causal`,
            for those before it.
        step: the forward call that this is part of.
        columns: original column of each slot, -1 for an empty one; None while nothing was dropped.
        cache_layer: this layer's part of the cache.
        chosen: which slots are read in this step, None for all.
        is_causal: with `mask` None and several queries, query i sees keys 0..i only.
        model_mask: the model's own mask, before parts hid more; None as `mask` is.
        score_mod: the pointwise changes of scores in force (soft caps, biases, parts), None without.
        sinks: logits per head that take part in the softmax without a value (GPT-OSS), or None.
        kwargs: whatever else the model passed to its attention function.
    """

    layer: int
    module: nn.Module
    q: Float[Tensor, "batch heads query dim"]
    k: Float[Tensor, "batch kv_heads keys dim"]
    v: Float[Tensor, "batch kv_heads keys value_dim"]
    scaling: float
    mask: Bool[Tensor, "batch mask_heads query keys"] | None
    step: Step
    columns: Int[Tensor, "batch kv_heads keys"] | None = None
    cache_layer: Any = None
    chosen: Chosen | None = None
    is_causal: bool = False
    model_mask: Bool[Tensor, "batch mask_heads query keys"] | None = None
    score_mod: ScoreMod | None = None
    sinks: Float[Tensor, " heads"] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def phase(self) -> str:
        """ "prefill" for a call of several tokens or without a past, "decode" for one token."""
        return "decode" if self.q.shape[2] == 1 and self.step.offset else "prefill"

    @property
    def groups(self) -> int:
        """Query heads to a key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def positions(self) -> Int[Tensor, "batch query"]:
        """Position ids of the queries, as the model counts them."""
        given = self.step.positions
        if given is not None and given.ndim != 2:
            raise UserError(
                f"position_ids of {given.ndim} dimensions are not supported; only [batch, tokens]"
            )
        if given is None:
            first = self.step.offset
            given = torch.arange(first, first + self.q.shape[2], device=self.q.device)[None]
        return given.expand(self.q.shape[0], -1)

    @property
    def hidden(self) -> Float[Tensor, "batch query width"] | None:
        """What the attention module was given, where a part `wants_hidden`."""
        return self.step.hidden.get(self.module)

    @property
    def real(self) -> Bool[Tensor, "batch query"] | None:
        """Which of this call's tokens are no padding; None when all are."""
        if self.step.real is None:
            return None
        first = self.step.offset
        return self.step.real[:, first : first + self.q.shape[2]].to(self.q.device)

    @property
    def queries(self) -> Int[Tensor, " query"]:
        """Original columns of the queries."""
        first = self.step.offset
        return torch.arange(first, first + self.q.shape[2], device=self.q.device)

    @property
    def head_columns(self) -> Int[Tensor, "batch heads keys"] | None:
        """`columns` repeated for the query heads."""
        if self.columns is None:
            return None
        return self.columns.repeat_interleave(self.groups, dim=1)


class Part:
    """What attaches to a model. Override the hooks that the part needs, named by stage."""

    #: The part reads `call.hidden`, the states from which the layer makes queries, keys and values.
    wants_hidden: bool = False
    #: What `attlas compare --preset cache` compares this part with the others at, each as it stands
    #: behind the part's name in `--methods`: "(keep=0.5)", "(bits=4)+other(keep=0.25)". Not inherited.
    comparable: ClassVar[tuple[str, ...]] = ()

    def check(self, model: nn.Module) -> None:
        """Look at the model before anything is changed.

        Raises:
            ValueError: the part cannot work on this model.
        """

    def cache_layers(self, layers: list[Any], model: nn.Module) -> list[Any]:
        """The layers that an empty cache shall have, given those it came with.

        A layer that drops tokens tells so by `columns()`, the original column of each of its slots
        (-1 for an empty one; None while nothing is dropped), and by `ragged`, whether there are
        empty ones; it counts the tokens that it has seen, not those it holds.
        """
        return layers

    def begin(self, step: Step) -> None:
        """Called before each forward call of the model."""

    def score_mod(self, call: Call) -> ScoreMod | None:
        """A pointwise change of this call's scores, None for no change.

        Its indices are columns of the original sequence, whatever a cache has dropped.
        """
        return None

    def mask(self, call: Call) -> Bool[Tensor, "#batch #heads #query keys"] | None:
        """Pairs of query and slot that may meet, combined with the model's own mask; None: all."""
        return None

    def select(self, call: Call) -> Chosen | None:
        """The slots that this step reads; None for all. One part of a session may choose."""
        return None

    def attend(self, call: Call) -> Float[Tensor, "batch query heads value_dim"] | None:
        """The whole attention of this call in another way; None leaves it to the next part, or to us."""
        return None

    def output(
        self, call: Call, heads: Float[Tensor, "batch query heads value_dim"]
    ) -> Float[Tensor, "batch query heads value_dim"]:
        """The heads' outputs, changed or as they are."""
        return heads

    def observe(self, call: Call) -> None:
        """Called after this call's attention, without gradients."""


class Selector(Part):
    """Reads a part of the keys that are there; the others stay where they are."""

    kind: ClassVar[Kind] = SELECT


class Recorder(Part):
    """Looks at attention weights, given block by block and never as a whole."""

    kind: ClassVar[Kind] = RECORD

    def update(
        self,
        call: Call,
        weights: Float[Tensor, "batch heads query keys"],
        queries: Int[Tensor, " query"],
        keys: Int[Tensor, " keys"] | Int[Tensor, "batch heads keys"],
    ) -> None:
        """Take in a block of float32 weights.

        Args:
            call: where the weights come from.
            weights: they sum to one over the keys (to less where the model has sink logits, and to
                zero in rows that are padding).
            queries: original columns of the block's queries.
            keys: original columns of its keys, per head where a cache dropped tokens (-1: empty).
        """
        raise NotImplementedError

    def result(self) -> Any:
        """What was recorded, layers stacked first."""
        raise NotImplementedError
