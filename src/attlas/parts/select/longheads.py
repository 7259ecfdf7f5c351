"""LongHeads: each head reads a few chunks of a long text, set side by side within the trained length.

The text is cut into chunks of w tokens. With q, k as if each chunk began at position 0,

    m_g = mean over the chunk's tokens of softmax(q kᵀ/√d) v        attention inside the chunk, both ways
    c_g = Σ_j softmax(m_g·k_j/√d) k_j                               the chunk's key, for each query head

A query at token t in chunk o = ⌊t/w⌋ scores the chunks by (its q without rotation) · c_g and reads
chunk 0, o − 1, o and the best of the others, n in all, as if they stood one behind the other: the chunk
in place p at positions pw … pw + w − 1. No distance exceeds the length L = nw. Rotation knows distances
alone, so instead of every key the query is moved: for chunk g it stands w((o − g) − (n − 1 − p)) nearer.
Tokens before `begin` attend to all before them. Chunks are the pages of this package's other selections.

Cost: L pairs a token and head beside t/w scores; c_g and the queries of the unfinished chunk are held.
The prompt is read in blocks of queries, in memory linear in its length. With L ≥ the length of the
text it is full attention.

Source: "LongHeads: Multi-Head Attention is Secretly a Long Context Processor". The authors' code lets no
query of a prompt beyond `begin` attend to itself (though those of generated tokens do), against the
paper's causal attention: `attend_self=False` does as it does.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attlas import masks, ops
from attlas.attach.call import Call
from attlas.cache.chunks import ChunkKeys, gathered
from attlas.cache.part import Role
from attlas.cache.selection import Selection, first_body
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.ops.pages import best_pages
from attlas.ops.reference import merge
from attlas.options import option
from attlas.storage.body import Body
from attlas.storage.layer import Chosen, LayerState, StoredLayer
from attlas.storage.packed import PackedBody

#: Numbers of keys gathered at once when a prompt is read.
AT_ONCE = 2**22


@mechanism("longheads", example={"page": 4, "length": 16})
class LongHeads(Selection):
    """Read long texts with a model trained on short ones, each head its own chunks."""

    joins: ClassVar[tuple[Role, ...]] = ()
    without = ("recent", "dense_layers", "block", "offload", "capacity")
    rotates = True
    one_rotation = True
    exact_prefill = False
    changes = ("position", "mask")

    page: int = option(
        "tokens of a chunk; the authors' 256", default=256, at_least=1, kw_only=False,
        former="chunk",
    )  # fmt: skip
    length: int = option(
        "tokens that a query may attend, a number of chunks, at most what the model was trained on; "
        "the authors' 4096", default=4096, at_least=1, kw_only=False,
    )  # fmt: skip
    first_choosing: int = option(
        "from this token on chunks are chosen, a number of chunks; length unless given", at_least=1,
        factory=lambda part: part.length, alias="begin",
    )  # fmt: skip
    attend_self: bool = option("a query also attends to its own token", default=True)

    def setup(self) -> None:
        """Refuse fewer than three chunks, and lengths that are no number of chunks."""
        super().setup()
        for name, value in (("length", self.length), ("begin", self.first_choosing)):
            if value % self.page:
                raise UserError(f"{name} must be a number of chunks of {self.page}, got {value}")
        if self.length < 3 * self.page:
            raise UserError(
                f"length holds the first chunk and the last two, 3 x {self.page}; got {self.length}"
            )

    def check(self, model: nn.Module) -> None:
        """Refuse a length beyond the model's positions."""
        super().check(model)
        config: Any = model.config
        trained = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        if trained is not None and self.length > trained:
            raise UserError(f"length={self.length} exceeds the model's {trained} positions")

    # Chunk keys, from every call.

    def learn(self, state: LayerState, call: Call) -> None:
        """The keys of the chunks that this call completed, unless its attention made them already."""
        if (self.name, state.layer) not in call.forward_pass.shared:
            ChunkKeys(self.page, state).grow(call)
            call.forward_pass.shared[self.name, state.layer] = True

    def later(self, layer: StoredLayer, state: LayerState, call: Call) -> None:
        """Compress the prompt, and pack whole chunks."""
        self.learn(state, call)
        super().later(layer, state, call)

    def choose(self, state: LayerState, body: Body, call: Call) -> Chosen | None:
        """Nothing: heads that move their queries attend by themselves."""
        return None

    # Attention.

    def attend(self, call: Call) -> Float[Tensor, "batch query heads value_dim"] | None:
        """Attention of this call, unless all its tokens come before `begin`.

        Raises:
            ValueError: the model or another part changes scores.
        """
        layer = call.cache_layer
        state = layer.learned.get(self.name) if isinstance(layer, StoredLayer) else None
        if state is None:
            return None
        if call.score_mod is not None or call.sinks is not None:
            raise UserError("LongHeads moves queries, and cannot honour changed scores or sinks")
        with torch.no_grad():
            self.learn(state, call)
        if max(call.counts[1]) <= self.first_choosing:
            return None
        body = first_body(layer)
        if call.q.shape[2] == 1 and isinstance(body, PackedBody):
            heads = self._step(layer, body, state, call)
        else:
            heads = self._prompt(layer, state, call)
        return heads.transpose(1, 2).contiguous()

    def _step(
        self, layer: StoredLayer, body: PackedBody, state: LayerState, call: Call
    ) -> Float[Tensor, "batch heads 1 v_dim"]:
        """One token: its chosen chunks out of the packed ones, then all that is not packed."""
        rank = torch.tensor(call.counts[1], device=call.q.device)[:, None] - 1
        index, moved = self.pick(state, call.q, rank, call.positions)
        index, moved = index[:, :, 0], moved[:, :, 0]
        k, v = (gathered(x, index, self.page) for x in body.read())
        scores = torch.einsum("bhcd,bhcwd->bhcw", moved * call.scaling, k)
        scores = scores.masked_fill(index[..., None] < 0, -torch.inf).flatten(2)[:, :, None]
        lse = scores.logsumexp(-1)
        weights = (scores - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]).exp()
        near = layer.segments(self._seen(layer, call))[1:]
        parts = [(weights @ v.flatten(2, 3), lse), ops.decode(call.q, near, scale=call.scaling)]
        layer.read_bytes = sum(s.nbytes for s in near) + state.tensors["chunks"].nbytes
        layer.read_bytes += (
            index.numel() * self.page * (k[0, 0, 0, 0].nbytes + v[0, 0, 0, 0].nbytes)
        )
        return merge([(out, mass.to(lse.dtype)) for out, mass in parts])[0]

    def _seen(self, layer: StoredLayer, call: Call) -> Bool[Tensor, "batch 1 1 seen"] | None:
        """What may be attended, in original positions; None for everything."""
        valid = call.rows.valid
        if valid is None and self.attend_self:
            return None
        shape = (call.q.shape[0], layer.seen)
        seen = torch.ones(shape, dtype=torch.bool, device=call.q.device)
        if valid is not None:
            seen &= valid.to(seen.device)
        if not self.attend_self:
            seen[:, -1] = False
        return seen[:, None, None]

    def _prompt(
        self, layer: StoredLayer, state: LayerState, call: Call
    ) -> Float[Tensor, "batch heads query v_dim"]:
        """Several tokens: causal attention before `begin`, then block by block of queries."""
        k, v, _ = layer.read()
        columns = layer.original_positions()
        k, v = (call.rows.aligned(x, columns) for x in (k, v))
        rank, valid = call.ranks
        plain, choosing = (
            (rank < self.first_choosing) & valid,
            (rank >= self.first_choosing) & valid,
        )
        heads = call.q.new_zeros(*call.q.shape[:3], v.shape[-1])
        if bool(plain.any()):
            span = _span(plain)
            found = self._causal(call, k, v, rank, span)
            heads[:, :, span] = torch.where(plain[:, None, span, None], found, 0.0)
        width = call.q.shape[0] * call.q.shape[1] * self.length * call.q.shape[-1]
        size, span = max(1, AT_ONCE // width), _span(choosing)
        for start in range(span.start, span.stop, size):
            at = slice(start, min(start + size, span.stop))
            found = self._chosen(state, call, k, v, rank, at)
            heads[:, :, at] = torch.where(choosing[:, None, at, None], found, heads[:, :, at])
        return heads

    def _causal(
        self, call: Call, k: Tensor, v: Tensor, rank: Int[Tensor, "batch query"], span: slice
    ) -> Float[Tensor, "batch heads span v_dim"]:
        k, v = k[:, :, : self.first_choosing], v[:, :, : self.first_choosing]
        mask: Any = masks.causal
        if call.rows.valid is not None:
            numbers = torch.arange(k.shape[2], device=rank.device)
            mask = (numbers <= rank[:, None, span, None]).expand(-1, 1, -1, -1)
        return ops.attend(
            call.q[:, :, span], k, v, mask=mask, scale=call.scaling,
            q_offset=call.forward_pass.offset + span.start,
        )  # fmt: skip

    def _chosen(
        self, state: LayerState, call: Call, k: Tensor, v: Tensor, rank: Tensor, at: slice
    ) -> Float[Tensor, "batch heads block v_dim"]:
        """A block of queries, each with its own chunks: the chosen ones, and the one it stands in."""
        rank, w = rank[:, at], self.page
        q = call.q[:, :, at]
        index, moved = self.pick(state, q, rank, call.positions[:, at])
        own = (rank // w)[:, None, :, None].expand(*index.shape[:3], 1).to(index.dtype)
        index, moved = torch.cat([index, own], -1), torch.cat([moved, q[..., None, :]], -2)
        keys, values = (
            gathered(x, index.flatten(2), w).unflatten(2, index.shape[2:]) for x in (k, v)
        )
        scores = torch.einsum("bhqcd,bhqcwd->bhqcw", moved * call.scaling, keys)
        token = index[..., None] * w + torch.arange(w, device=index.device)
        last = rank[:, None, :, None, None] - (0 if self.attend_self else 1)
        scores = scores.masked_fill((token < 0) | (token > last), -torch.inf).flatten(3)
        found: Tensor = scores.softmax(-1)[..., None, :] @ values.flatten(3, 4)
        return found[..., 0, :]

    def pick(
        self,
        state: LayerState,
        q: Float[Tensor, "batch heads queries dim"],
        rank: Int[Tensor, "batch queries"],
        positions: Int[Tensor, "batch queries"],
    ) -> tuple[
        Int[Tensor, "batch heads queries chunks"], Float[Tensor, "batch heads queries chunks dim"]
    ]:
        """(chunks beside its own that each query and head reads, the query moved for each).

        Chunks are ascending, −1 where there are fewer. A query before `begin` reads all before it.
        """
        keys, w = state.tensors["chunks"], self.page
        wide, rotary = torch.promote_types(q.dtype, torch.float32), state.rotary
        raw = q.to(wide) if rotary is None else rotary.unrotate(q, positions)
        own = (rank // w)[:, None, :, None]
        number = torch.arange(keys.shape[2], device=q.device)
        scores = raw @ keys.to(wide).mT
        # The code of the authors gives what must be read the largest score there is.
        scores = scores.masked_fill((number == 0) | (number == own - 1), torch.inf)
        scores = scores.masked_fill(number >= own, -torch.inf)
        most = self.length // w - 1
        plain = rank < self.first_choosing
        if bool(plain.any()):
            most = max(most, int((rank // w)[plain].max()))
        index = best_pages(scores.flatten(1, 2), most).unflatten(1, scores.shape[1:3])
        if most >= self.length // w:  # only the queries before `begin` read so many
            fewer = best_pages(scores.flatten(1, 2), self.length // w - 1)
            fewer = fewer.unflatten(1, scores.shape[1:3])
            fewer = nn.functional.pad(fewer, (0, index.shape[-1] - fewer.shape[-1]), value=-1)
            index = torch.where(plain[:, None, :, None], index, fewer)
        place = torch.arange(index.shape[-1], device=q.device)
        there = index >= 0
        skipped = (own - index) - (there.sum(-1, keepdim=True) - place)
        if rotary is None:
            return index, raw[..., None, :].expand(*index.shape, -1).to(q.dtype)
        stand = positions[:, None, :, None] - w * skipped.masked_fill(~there, 0)
        cos, sin = (
            x.unflatten(1, stand.shape[1:]).to(wide) for x in rotary.angles(stand.flatten(1))
        )
        return index, rotary.turn(raw[..., None, :].expand(*index.shape, -1), cos, sin).to(q.dtype)


def _span(there: Bool[Tensor, "batch query"]) -> slice:
    """From the first column in which some row has one to the last; empty when none has."""
    columns = there.any(dim=0).nonzero()[:, 0].tolist()
    return slice(columns[0], columns[-1] + 1) if columns else slice(0, 0)
