"""ActQKV: a window of tokens asks for pages with one query, which its unusual tokens shape.

    b_t = mean over channels of (q_t − m)² / (s + s̄/100)        activation bias; m, s: running mean and
    p   = Σ_t b_t q_t / Σ_t b_t                                  variance of queries, window by window
    score of a page = cos(p, mean key of the page)               all heads together

A prompt is read window by window: each attends the first tokens, the newest, and the pages of highest
score. With W queries of mean u and variance s_w, and N = min(windows so far, horizon),

    s ← (s (N − 1/W) + s_w + (u − m)²/(1 + 1/N)) / (N + 1 − 1/W)       m ← (m N + u) / (N + 1)

and b is uniform until more than `horizon` windows were seen: p is then the mean query. Queries and keys
meet as if all keys stood at one distance, that of the window's edge: rotation would favour near pages.

A generated token is its own probe, and the layers share what they read by how much their scores leave
open: with H the entropy of softmax(scores) over log(pages), averaged over the last windows and steps,

    pages of layer l = what is left of the total · H_l / Σ_{m ≥ l} H_m

rounded, and kept between 0.7 and 2 times the average so that the layers' pages sum to the total. Cost:
the pages' mean keys, one query against them, and what is chosen. With keep = 1 it is full attention.

Source: "Activation-aware Probe-Query: Effective Key-Value Retrieval for Long-Context LLMs Inference" and
the authors' code, which counts windows over all layers and prompts together (horizon 1000); here each
layer and prompt has its own statistics, hence a short horizon. Their pages are represented by the four
keys that local attention favours, here by all; they add the question's score to a page's, and give far
keys one distance in attention too, which is not done here.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from attlas import ops
from attlas.attach.call import Call
from attlas.cache.part import Role
from attlas.cache.probes import Running, page_cosines, probe
from attlas.cache.selection import PortionSelection, keys_of, lengths_of
from attlas.cache.summaries import extend, first_best
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.options import option
from attlas.storage.body import Body
from attlas.storage.layer import Chosen, LayerState, StoredLayer
from attlas.storage.rows import Rows, left_aligned

#: A layer reads at least and at most this many times the average: 32 and 92 of 46 pages with the authors.
LEAST, MOST = 0.7, 2
#: Windows and steps over which a layer's entropy is averaged.
HISTORY = 100
#: A little more than a half, so that ties are rounded up whatever the last bit.
HALF = 0.501


@mechanism(
    "actqkv-probe-query", aliases=("actqkv",),
    example={"tokens": 4, "page": 2, "window": 6, "sinks": 2, "recent": 4},
)  # fmt: skip
class ActQKV(PortionSelection):
    """Retrieve pages for each window of a prompt by its probe query, and for each token by its own."""

    changes = ("score", "mask")
    #: Keys are rotated back by their place in the text, which other parts would change.
    joins: ClassVar[tuple[Role, ...]] = ()
    without = ("dense_layers", "offload", "capacity")
    rotates = True
    one_rotation = True
    exact_prefill = False
    whole_prompts = True
    everything: ClassVar[dict[str, Any]] = {"tokens": 4096}

    keep: float | None = option(
        "share of the far tokens that is read, on average over the layers", default=None, above=0,
        at_most=1, kw_only=False,
    )  # fmt: skip
    page: int = option("tokens of a page", default=32, at_least=1)
    window: int | None = option(
        "tokens of a prompt that retrieve together; None reads prompts in full", default=256,
        at_least=1,
    )  # fmt: skip
    sinks: int = option(
        "first tokens that are always read, a number of pages", default=64, at_least=0
    )
    recent: int = option(
        "tokens before a window that are always read; the newest while decoding", default=512,
        at_least=0, former="local",
    )  # fmt: skip
    horizon: int = option("windows over which the statistics of queries run", default=4, at_least=1)

    def setup(self) -> None:
        """Refuse sinks that fill no pages."""
        super().setup()
        if self.sinks % self.page:
            raise UserError(
                f"sinks must be a whole number of pages of {self.page}, got {self.sinks}"
            )

    # The prompt, window by window.

    def attend(self, call: Call) -> Float[Tensor, "batch query heads value_dim"] | None:
        """A prompt's attention, each window to its own pages; None while nothing is far.

        Raises:
            ValueError: the model or another part changes scores.
        """
        layer, size = call.cache_layer, self.window
        state = layer.learned.get(self.name) if isinstance(layer, StoredLayer) else None
        if state is None or size is None or layer.compressed or call.q.shape[2] == 1:
            return None
        if call.score_mod is not None or call.sinks is not None:
            raise UserError("ActQKV reads a prompt by windows, and cannot honour changed scores")
        before, after = call.counts
        new = [b - a for a, b in zip(before, after, strict=True)]
        far = max(after) - self.recent > self.sinks + self.page
        rank, valid = call.ranks
        q = call.q if call.rows.valid is None else left_aligned(call.q, valid)
        positions = left_aligned(call.positions[:, None, :, None], valid)[:, 0, :, 0]
        asked = self._at_the_edge(state, q, positions)
        k, v = (call.rows.aligned(x) for x in (call.k, call.v))
        pages = self._page_keys(state, k, call.row_starts) if far else None
        starts, counts = (torch.tensor(n, device=q.device) for n in (before, new))
        heads = q.new_zeros(*q.shape[:3], v.shape[-1]) if far else None
        for start in range(0, max(new), size):
            stop = min(start + size, max(new))
            there = torch.arange(start, stop, device=q.device) < counts[:, None]
            query = self._ask(state, asked[:, :, start:stop], there)
            if pages is None or heads is None:
                continue
            scores = page_cosines(query, pages)
            at, seen = self._read(state, scores, starts + start, there, k)
            heads[:, :, start:stop] = _window(
                q[:, :, start:stop], k, v, at, seen, starts + start, call.scaling
            )
        if heads is None:
            return None
        back = (rank - starts[:, None]).clamp(min=0)[:, None, :, None].expand_as(heads)
        return heads.gather(2, back).transpose(1, 2).contiguous()

    def _ask(
        self, state: LayerState, q: Float[Tensor, "batch heads tokens dim"], there: Tensor
    ) -> Float[Tensor, "batch heads dim"]:
        """A window's probe query; the statistics move on."""
        flat, tensors = q.transpose(1, 2).flatten(2), state.tensors
        known = Running.empty(flat)
        if "mean" in tensors:
            known = Running(tensors["mean"], tensors["var"], tensors["windows"])
        query, _, known = probe(flat, there, known, self.horizon)
        tensors |= known._asdict()
        heads: Tensor = query.unflatten(1, (q.shape[1], -1))
        return heads

    def _read(
        self, state: LayerState, scores: Float[Tensor, "batch pages"], start: Tensor, there: Tensor,
        k: Tensor,
    ) -> tuple[Int[Tensor, "batch slots"], Bool[Tensor, "batch slots"]]:  # fmt: skip
        """(what a window reads, whether it is there): first tokens, retrieved pages, the newest."""
        first = self.sinks // self.page
        near = ((start - self.recent).clamp(min=0) // self.page).clamp(min=first)
        count = (near - first).clamp(min=0)
        scores = scores[:, first:]
        wanted = self.portion.of_rows(count[:, None])[:, 0]
        chosen = first_best(scores, count, wanted, int(wanted.max()))
        self._note(state, scores, count, there.any(1))
        pages = torch.where(chosen >= 0, chosen + first, -1)
        inside = torch.arange(self.page, device=start.device)
        slots = (pages[..., None] * self.page + inside).flatten(1)
        near = near * self.page
        newest = near[:, None] + torch.arange(
            self.recent + self.page + there.shape[1], device=start.device
        )
        head = torch.arange(self.sinks, device=start.device).expand(len(start), -1)
        at = torch.cat([head, slots, newest], dim=1)
        return at.clamp(0, k.shape[2] - 1), (at >= 0) & (at < k.shape[2])

    # Decoding.

    def learn(self, state: LayerState, call: Call) -> None:
        """Where each row's positions begin."""
        first = call.row_starts
        if call.rows.valid is not None and "first" in state.tensors:
            some = call.ranks[1].any(1)
            first = torch.where(some, first, state.tensors["first"])
        state.tensors["first"] = first

    def compress(self, layer: StoredLayer, state: LayerState, rows: Rows) -> None:
        """Pack pages; the statistics of the prompt's queries are not needed any more."""
        for name in Running._fields:
            state.tensors.pop(name, None)
        super().compress(layer, state, rows)

    def summarize(self, state: LayerState, body: Body) -> None:
        """The mean key of every page."""

        def make(rows: slice, start: int, stop: int) -> dict[str, Tensor]:
            keys, first = keys_of(body, start, stop)[rows], state.tensors["first"][rows]
            return {"pages": self._page_keys(state, keys, first + start)}

        extend(state, body, self.page, ("pages",), make)

    def choose(self, state: LayerState, body: Body, call: Call) -> Chosen | None:
        """The first pages, and the best of the others, as many as this layer's scores ask for."""
        asked = self._at_the_edge(state, call.q, call.positions)[:, :, 0]
        pages, first = state.tensors["pages"], self.sinks // self.page
        scores = page_cosines(asked, pages)[:, first:]
        lengths, batch = lengths_of(body), asked.shape[0]
        if lengths is None:
            count = torch.full((batch,), scores.shape[1], device=asked.device)
        else:
            count = (lengths[:, 0] // self.page - first).clamp(min=0)
        self._note(state, scores, count, count >= 0)
        allowed = self._share(state, call, self.portion.of_rows(count[:, None])[:, 0], count)
        chosen = first_best(scores, count, allowed, int(allowed.max()))
        sinks = torch.arange(first, dtype=torch.int32, device=asked.device).expand(batch, -1)
        index = torch.cat([sinks, torch.where(chosen >= 0, chosen + first, -1)], dim=1)
        index = index[:, None].expand(-1, pages.shape[1], -1).contiguous()
        return Chosen(index, self.page, body.slots, scored=pages.nbytes)

    def _share(
        self,
        state: LayerState,
        call: Call,
        mean: Int[Tensor, " batch"],
        most: Int[Tensor, " batch"],
    ) -> Int[Tensor, " batch"]:
        """Pages of this layer: of what the layers before it left, in proportion to its entropy."""
        layers: list[Any] = call.forward_pass.cache.layers
        behind = [i for i in state.full if i > state.layer]
        left = call.forward_pass.shared.get((self.name, "left"))
        left = mean * len(state.full) if left is None else left
        own = state.tensors["entropy"].nanmean(1)
        total = own
        for number in behind:
            known = layers[number].learned[self.name].tensors.get("entropy")
            total = total + (torch.nan if known is None else known.nanmean(1))
        # Equal shares as long as some layer behind has not been asked.
        share = (own / total.clamp(min=1e-12)).nan_to_num(nan=1 / (1 + len(behind)))
        least, largest = (mean * LEAST).long(), torch.minimum(mean * MOST, most)
        low = torch.maximum(least, left - largest * len(behind))
        high = torch.minimum(largest, left - least * len(behind))
        pages = (share * left + HALF).floor().long().maximum(low).minimum(high)
        call.forward_pass.shared[self.name, "left"] = left - pages
        return pages

    def _note(
        self,
        state: LayerState,
        scores: Float[Tensor, "batch pages"],
        count: Int[Tensor, " batch"],
        some: Bool[Tensor, " batch"],
    ) -> None:
        """Remember how much a window's or token's scores leave open, from 0 to 1; NaN where none was."""
        there = torch.arange(scores.shape[1], device=scores.device) < count[:, None]
        weights = scores.masked_fill(~there, -torch.inf).softmax(1).nan_to_num()
        entropy = -(weights * weights.clamp(min=1e-30).log()).sum(1, keepdim=True)
        entropy = torch.where(count[:, None] > 1, entropy / count[:, None].clamp(min=2).log(), 1.0)
        known = state.tensors.get("entropy", entropy[:, :0])
        longer = torch.cat([known, entropy], dim=1)
        same = torch.cat([torch.full_like(entropy, torch.nan), known], dim=1)
        state.tensors["entropy"] = torch.where(some[:, None], longer, same)[:, -HISTORY:]

    def _at_the_edge(
        self, state: LayerState, q: Float[Tensor, "batch heads n dim"], positions: Tensor
    ) -> Float[Tensor, "batch heads n dim"]:
        """Queries as they stand `recent` tokens behind the keys, whose own rotation is undone."""
        rotary = state.rotary
        if rotary is None:
            return q.float()
        edge = torch.full_like(positions, self.recent)
        return rotary.rotate(rotary.unrotate(q, positions), edge)

    def _page_keys(
        self,
        state: LayerState,
        k: Float[Tensor, "batch kv_heads n dim"],
        first: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch kv_heads pages dim"]:
        """Means of whole pages of keys, the first at position `first`, without rotation."""
        k = k[:, :, : k.shape[2] // self.page * self.page]
        rotated = k
        if state.rotary is not None:
            positions = first[:, None] + torch.arange(k.shape[2], device=k.device)
            rotated = state.rotary.unrotate(k, positions)
        means: Tensor = rotated.unflatten(2, (-1, self.page)).mean(3).to(k.dtype)
        return means


def _window(
    q: Float[Tensor, "batch heads w dim"],
    k: Float[Tensor, "batch kv_heads n dim"],
    v: Float[Tensor, "batch kv_heads n v_dim"],
    at: Int[Tensor, "batch slots"],
    there: Bool[Tensor, "batch slots"],
    start: Int[Tensor, " batch"],
    scaling: float,
) -> Float[Tensor, "batch heads w v_dim"]:
    """Attention of a window over the slots it reads, each once, none later than the query."""
    k, v = (x.gather(2, at[:, None, :, None].expand(*x.shape[:2], -1, x.shape[3])) for x in (k, v))
    rank = start[:, None] + torch.arange(q.shape[2], device=q.device)
    mask = there[:, None] & (at[:, None] <= rank[..., None])
    return ops.attend(q, k, v, mask=mask[:, None], scale=scaling)
