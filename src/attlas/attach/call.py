"""What parts see: the `ForwardPass` under way, one layer's attention in it (`Call`), a `Site`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attlas import former
from attlas.attach.where import Spans, in_spans
from attlas.errors import UserError
from attlas.positions import ScoreMod
from attlas.storage.layer import Chosen
from attlas.storage.rows import Rows


@dataclass(slots=True)
class ForwardPass:
    """One forward call of the model.

    Attributes:
        cache: the Transformers cache in use, None without one.
        valid: which of the tokens seen so far are no padding; None when all are.
        positions: the position ids given with the call, None when the model counts them itself.
        earlier: position ids of the last tokens before this call, as they were given then; None where
            no call was seen.
        windows: the first column that each sliding-window layer of the cache holds in this call.
        offset: tokens that the cache had seen before this call.
        length: tokens of this call; 0 when the model takes no tokens (images).
        chunked: the prompt comes in several calls, and goes on behind this one as far as is known.
        ended: it was thought to go on, and this call's single token shows that it does not.
        drafted: the tokens are candidates of assisted decoding, each as if it came alone.
        ids: the token ids of this call, None when the model is given embeddings or images.
        hidden: what the attention module under way was given, by module; filled when a part
            `wants_hidden`.
        shared: what parts work out once for all layers of the call.
    """

    cache: Any = None
    valid: Bool[Tensor, "batch seen"] | None = None
    positions: Int[Tensor, "*rows query"] | None = None
    earlier: Int[Tensor, "*rows known"] | None = None
    windows: dict[int, int] = field(default_factory=dict)
    offset: int = 0
    length: int = 0
    chunked: bool = False
    ended: bool = False
    drafted: bool = False
    ids: Int[Tensor, "batch query"] | None = None
    hidden: dict[nn.Module, Tensor] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return former.attribute(self, name)

    def last(self, count: int) -> ForwardPass:
        """This call as a layer sees it that is given its last tokens alone, as if they came later."""
        if not 0 < count < self.length:
            return self
        skipped, positions, earlier = self.length - count, self.positions, self.earlier
        if positions is not None:
            before = positions[..., :skipped]
            rows = () if earlier is None else (earlier.expand(*before.shape[:-1], -1),)
            earlier, positions = torch.cat([*rows, before], dim=-1), positions[..., skipped:]
        return replace(
            self, offset=self.offset + skipped, length=count, positions=positions, earlier=earlier,
            ids=None if self.ids is None else self.ids[:, skipped:],
            shared=self.shared.setdefault(("last", count), {}),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Site:
    """Where something passes in a forward call.

    Attributes:
        layer: index of the layer.
        point: the name of the place, see `Part.stream`; "project" before queries, keys and values.
        module: of the model, that takes or gives what passes.
        forward_pass: the forward call that this is part of.
    """

    layer: int
    point: str
    module: nn.Module
    forward_pass: ForwardPass

    def __getattr__(self, name: str) -> Any:
        return former.attribute(self, name)


@dataclass(slots=True)
class Call:
    """One layer's attention in one forward call, handed to every part, complete before any hook runs.

    Keys stand in slots: slot s of a cache that dropped tokens, or let a window of them go, holds the
    token of column `original_positions[..., s]` of the original sequence; else both are the same.

    Attributes:
        layer: index of the layer.
        source: the layer whose keys it reads, itself unless layers share them.
        module: the model's attention module.
        q: queries, rotated where the model rotates them.
        k: keys in the cache, those of this call last; not repeated for grouped heads. Where the cache
            holds them encoded and no part of the session looks at keys one by one (`held`), those of
            this call alone, and neither mask nor columns are told.
        v: values likewise.
        scaling: factor of q·k.
        mask: which slots each query may attend (True = may), None for all or, with `is_causal`,
            for those up to its own; the last query stands at the last key.
        forward_pass: the forward call that this is part of.
        original_positions: column of the sequence that each slot holds, -1 for an empty one; None
            while all columns are there.
        held: attention reads the cache in the form in which it holds its keys.
        cache_layer: this layer's part of the cache.
        chosen: which slots are read in this step, None for all.
        changers: the parts that change this layer's weights.
        is_causal: with `mask` None and several queries, no query sees later keys.
        model_mask: the model's own mask, before parts hid more; None as `mask` is.
        score_mod: the pointwise changes of scores in force (soft caps, biases, parts), None without.
        sinks: logits per head that take part in the softmax without a value (GPT-OSS), or None.
        kwargs: whatever else the model passed to its attention function.
    """

    layer: int
    module: nn.Module
    q: Float[Tensor, "batch heads query dim"]
    k: Float[Tensor, "batch kv_heads keys key_dim"]
    v: Float[Tensor, "batch v_heads keys value_dim"]
    scaling: float
    mask: Bool[Tensor, "batch mask_heads query keys"] | None
    forward_pass: ForwardPass
    source: int = -1
    original_positions: Int[Tensor, "batch kv_heads keys"] | None = None
    cache_layer: Any = None
    held: bool = False
    chosen: Chosen | None = None
    changers: tuple[Any, ...] = ()
    is_causal: bool = False
    model_mask: Bool[Tensor, "batch mask_heads query keys"] | None = None
    score_mod: ScoreMod | None = None
    sinks: Float[Tensor, " heads"] | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return former.attribute(self, name)

    @property
    def phase(self) -> str:
        """ "prefill" for a call of several tokens or without a past, "decode" for one token.

        Candidates of assisted decoding are decoded too.
        """
        step = self.q.shape[2] == 1 or self.forward_pass.drafted
        return "decode" if step and self.forward_pass.offset else "prefill"

    @property
    def groups(self) -> int:
        """Query heads to a key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def positions(self) -> Int[Tensor, "batch query"]:
        """Position ids of the queries, as the model counts them."""
        given = self.forward_pass.positions
        if given is not None and given.ndim != 2:
            raise UserError(
                f"position_ids of {given.ndim} dimensions are not supported; only [batch, tokens]"
            )
        if given is None:
            first = self.forward_pass.offset
            given = torch.arange(first, first + self.q.shape[2], device=self.q.device)[None]
        return given.expand(self.q.shape[0], -1)

    @property
    def hidden(self) -> Float[Tensor, "batch query width"] | None:
        """What the attention module was given, where a part `wants_hidden`."""
        return self.forward_pass.hidden.get(self.module)

    @property
    def rows(self) -> Rows:
        """Which of the tokens seen, those of this call included, are valid."""
        shared = self.forward_pass.shared
        if "rows" not in shared:
            shared["rows"] = Rows(
                self.forward_pass.valid, self.forward_pass.offset + self.q.shape[2]
            )
        found: Rows = shared["rows"]
        return found

    @property
    def ranks(self) -> tuple[Int[Tensor, "batch query"], Bool[Tensor, "batch query"]]:
        """(rank among its row's valid tokens, whether it is one) of each query."""
        if "ranks" not in self.forward_pass.shared:
            found = self.rows.last(self.q.shape[2], self.q.shape[0], self.q.device)
            self.forward_pass.shared["ranks"] = found
        rank, valid = self.forward_pass.shared["ranks"]
        return rank.to(self.q.device), valid.to(self.q.device)

    @property
    def counts(self) -> tuple[list[int], list[int]]:
        """(valid tokens of each row before this call, with it)."""
        shared, batch = self.forward_pass.shared, self.q.shape[0]
        if "counts" not in shared:
            before = Rows(self.forward_pass.valid, self.forward_pass.offset)
            shared["counts"] = before.counts(batch), self.rows.counts(batch)
        found: tuple[list[int], list[int]] = shared["counts"]
        return found

    @property
    def row_starts(self) -> Int[Tensor, " batch"]:
        """Position of each row's first token, from any of this call's; 0 for a row without one."""
        rank, valid = self.ranks
        return (self.positions - rank).masked_fill(~valid, 0).sum(1) // valid.sum(1).clamp(min=1)

    @property
    def valid(self) -> Bool[Tensor, "batch query"] | None:
        """Which of this call's tokens are no padding; None when all are."""
        if self.forward_pass.valid is None:
            return None
        first = self.forward_pass.offset
        return self.forward_pass.valid[:, first : first + self.q.shape[2]].to(self.q.device)

    @property
    def queries(self) -> Int[Tensor, " query"]:
        """Original positions of the queries."""
        first = self.forward_pass.offset
        return torch.arange(first, first + self.q.shape[2], device=self.q.device)

    @property
    def key_positions(self) -> Int[Tensor, "#batch #kv_heads keys"]:
        """Position ids of the keys, as the model counted them when they came; -1 for an empty slot."""
        batch, device, own = self.q.shape[0], self.q.device, self.positions
        known = own[:, :0] if self.forward_pass.earlier is None else self.forward_pass.earlier
        # Of a cache from elsewhere positions count its valid tokens.
        missing = torch.arange(self.forward_pass.offset - known.shape[-1], device=device).expand(
            batch, -1
        )
        pieces = (self.rows.at(missing)[1], known, own)
        every = torch.cat([p.to(device).expand(batch, -1) for p in pieces], dim=1)
        if self.original_positions is None:
            return every[:, None, : self.k.shape[2]]
        at = self.original_positions.clamp(min=0).long()
        found = every[:, None].expand(-1, at.shape[1], -1).gather(-1, at)
        return found.masked_fill(self.original_positions < 0, -1)

    def in_spans(self, spans: Spans) -> Bool[Tensor, "batch columns"]:
        """Which columns hold a token of the spans, see `attlas.attach.where`."""
        columns = torch.arange(self.rows.seen, device=self.q.device).expand(self.q.shape[0], -1)
        there, ranks = self.rows.at(columns)
        return in_spans(spans, ranks, there)

    @property
    def head_original_positions(self) -> Int[Tensor, "batch heads keys"] | None:
        """`original_positions` repeated for the query heads."""
        if self.original_positions is None:
            return None
        return self.original_positions.repeat_interleave(self.groups, dim=1)
