"""LRQK: queries and keys in a few common dimensions, in which it is cheap to see what will be read.

Prompt, of one head:    min |Q Kᵀ − A_Q A_Kᵀ|² + |Q − A_Q B_Q|² + |K − A_K B_K|²

    B_Q = (A_Qᵀ A_Q)⁻¹ A_Qᵀ Q        A_Q ← Q (Kᵀ A_K + B_Qᵀ) (A_Kᵀ A_K + B_Q B_Qᵀ)⁻¹
    B_K = (A_Kᵀ A_K)⁻¹ A_Kᵀ K        A_K ← K (Qᵀ A_Q + B_Kᵀ) (A_Qᵀ A_Q + B_K B_Kᵀ)⁻¹

from the r channels in which |Q| + |K| is largest. Each step is the exact minimum over one factor.

Token with query q and key k, when Ω (the tokens read last, and the recent ones) is at hand:

    k̂ ← k B_Kᵀ (B_K B_Kᵀ)⁻¹                                                then, a few times,
    q̂ ← (q B_Qᵀ + q K_Ωᵀ A_Ω + (q·k) k̂) (B_Q B_Qᵀ + A_Ωᵀ A_Ω + k̂ᵀ k̂)⁻¹
    k̂ ← (k B_Kᵀ + (q·k) q̂) (B_K B_Kᵀ + q̂ᵀ q̂)⁻¹
    B  ← B − |∂B|² / (|x̂ ∂B|² + 10⁻⁶) · ∂B,  ∂B = x̂ᵀ (x̂ B − x)            for (x, B) = (q, B_Q), (k, B_K)

    read = the tokens of largest A_K q̂ᵀ, and the recent ones; both exactly

Every factor of the prompt is Q or K times a small matrix, A_Q = Q M_Q and A_K = K M_K, so all sweeps
need QᵀQ and KᵀK alone: no query is kept, and a prompt may come in pieces. Factors are of query heads,
as the authors' (who repeat keys first). Tokens of later calls of several, of which the paper says
nothing, get the first k̂ for a code.

Cost: r numbers a token and query head are held and read; a few r × r systems a token. Reads all tokens,
hence reduces to full attention, at keep = 1; at r = the head's width the codes give q·k itself.

Source: "Efficient Low Rank Attention for Long-Context Inference in Large Language Models".
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attlas.attach.call import Call
from attlas.cache.factors import coded, decoded, factorised
from attlas.cache.selection import PortionSelection, first_body, keys_of, lengths_of
from attlas.cache.summaries import best_portion, extend
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.hf.sources import layouts
from attlas.ops.reference import grouped_product, repeated, taken
from attlas.ops.segments import Coded, Listed, Segment, listed
from attlas.options import option
from attlas.storage.body import Body
from attlas.storage.layer import Chosen, LayerState, StoredLayer
from attlas.storage.low_rank import wide
from attlas.storage.rows import Rows


@mechanism(
    "lrqk-low-rank-attention", aliases=("lrqk",),
    example={"keep": 0.5, "rank": 4, "recent": 4, "block": 2},
)  # fmt: skip
class LRQK(PortionSelection):
    """Read the tokens whose keys' codes go best with the query's."""

    #: Codes choose which pairs meet.
    changes = ("score", "mask")
    without = ("page",)
    everything: ClassVar[dict[str, Any]] = {"keep": 1.0}
    comparable: ClassVar[tuple[str, ...]] = ("(keep=0.25)", "(keep=0.125)")

    tokens: int | None = option(
        "or their number; the authors' 1024 or 2048", default=None, at_least=1
    )
    rank: int = option("numbers of a code", default=32, at_least=1)
    recent: int = option("newest tokens that are always read", default=64, at_least=0)
    sweeps: int = option("over the factors of the prompt", default=2, at_least=1)
    refinements: int = option("of the codes of a later token", default=2, at_least=1)
    block: int = option("tokens that are packed at once", default=16, at_least=1)

    def check(self, model: nn.Module) -> None:
        """Refuse a rank above the width of a head."""
        super().check(model)
        dim = min(keys for keys, _ in layouts(model))
        if self.rank > dim:
            raise UserError(
                f"rank={self.rank} is more than the {dim} channels of this model's heads"
            )

    # The prompt.

    def learn(self, state: LayerState, call: Call) -> None:
        """Sum up QᵀQ, KᵀK and the channels' sizes over valid tokens, and hold the last query."""
        known, valid, q = state.tensors, call.valid, call.q
        k, last = call.k[:, :, -q.shape[2] :], q[:, :, -1:]
        if valid is not None:
            count = torch.arange(1, valid.shape[1] + 1, device=q.device)
            at = ((valid * count).amax(1) - 1)[:, None, None, None]
            last = q.gather(2, at.clamp(min=0).expand(-1, q.shape[1], -1, q.shape[3]))
            if "query" in known:
                last = torch.where(at >= 0, last, known["query"])
            q, k = (x * valid[:, None, :, None] for x in (q, k))
        q, k = wide(q), repeated(wide(k), q.shape[1])
        sizes = q.abs().sum(2) + k.abs().sum(2)
        sums = {"gram_q": q.mT @ q, "gram_k": k.mT @ k, "sizes": sizes}
        sums = {name: known[name] + x if name in known else x for name, x in sums.items()}
        state.tensors |= {**sums, "query": last.clone()}

    def compress(self, layer: StoredLayer, state: LayerState, rows: Rows) -> None:
        """Pack, and take the codes of what is packed along; first of all, find the prompt's."""
        known = state.tensors
        fresh = "gram_q" in known
        if fresh:
            sums = (known.pop(name) for name in ("gram_q", "gram_k", "sizes"))
            self._factorise(state, *sums)
        super().compress(layer, state, rows)
        if (body := first_body(layer)) is not None:
            self._code(layer, state, body)
        if fresh:
            self._begin(layer, state, rows)
        elif known["tail"].shape[2] != layer.dense_slots:
            columns = layer.dense_positions()
            known |= {"tail": at_columns(known, columns), "tail_columns": columns}

    def _factorise(self, state: LayerState, gram_q: Tensor, gram_k: Tensor, sizes: Tensor) -> None:
        found = factorised(gram_q, gram_k, sizes, self.rank, self.sweeps)
        names = ("m_q", "b_q", "m_k", "b_k")
        state.tensors |= {n: x.to(gram_q.dtype) for n, x in zip(names, found, strict=True)}

    def _code(self, layer: StoredLayer, state: LayerState, body: Body) -> None:
        """Codes of what was packed: of the prompt's keys, or those that the tokens had before."""
        known, dtype = state.tensors, layer.keys.dtype  # type: ignore[union-attr]

        def codes(rows: slice, start: int, stop: int) -> dict[str, Tensor]:
            if (m_k := known.get("m_k")) is not None:
                keys = repeated(keys_of(body, start, stop)[rows].to(m_k.dtype), m_k.shape[1])
                return {"codes": (keys @ m_k[rows]).to(dtype)}
            batch, heads = known["tail_columns"].shape[:2]
            columns = body.original_positions(batch, heads, known["tail"].device)[
                rows, :, start:stop
            ]
            return {"codes": at_columns(known, columns, rows)}

        extend(state, body, 1, ("codes",), codes)

    def _begin(self, layer: StoredLayer, state: LayerState, rows: Rows) -> None:
        """Codes of what stays as it is, and what the prompt's last query would have read."""
        known, keys, columns = state.tensors, layer.keys, layer.dense_positions()
        assert keys is not None
        there = layer.there(rows)
        m_k, query, m_q = (known.pop(name) for name in ("m_k", "query", "m_q"))
        heads = m_k.shape[1]
        codes = repeated(wide(keys), heads) @ m_k
        codes = codes * there.repeat_interleave(heads // there.shape[1], dim=1)[..., None]
        known |= {"tail": codes.to(keys.dtype), "tail_columns": columns}
        body = first_body(layer)
        if body is not None:
            known["last"] = self._best(state, body, wide(query) @ m_q)

    # Later tokens.

    def choose(self, state: LayerState, body: Body, call: Call) -> Chosen | None:
        """Code the new query and key, and name the tokens whose codes go best with the query's."""
        known, valid = state.tensors, call.valid
        q, k = wide(call.q), repeated(wide(call.k[:, :, -1:]), call.q.shape[1])
        pull, gram, read = at_hand(known, body, call.cache_layer, q)
        q_hat, k_hat, b_q, b_k = decoded(
            q, k, known["b_q"], known["b_k"], pull, gram, self.refinements
        )
        if valid is not None:  # padding has no code and moves no basis
            there = valid[:, None, :, None]
            k_hat = k_hat * there
            b_q, b_k = torch.where(there, b_q, known["b_q"]), torch.where(there, b_k, known["b_k"])
        index = self._best(state, body, q_hat)
        known |= {"b_q": b_q, "b_k": b_k, "new": k_hat, "last": index}
        codes = known["codes"].numel() + known["tail"].numel()
        read += codes * known["codes"].element_size()
        return Chosen(index, self.page, body.slots, read)

    def later(self, layer: StoredLayer, state: LayerState, call: Call) -> None:
        """Hold the new tokens' codes, then pack what is no longer recent."""
        known, valid, count = state.tensors, call.valid, call.q.shape[2]
        new = known.pop("new", None)
        if new is None:
            new = coded(repeated(wide(call.k[:, :, -count:]), call.q.shape[1]), known["b_k"])
            new = new if valid is None else new * valid[:, None, :, None]
        tail, columns = known["tail"], known["tail_columns"]
        at = torch.arange(
            layer.seen - count, layer.seen, dtype=columns.dtype, device=columns.device
        )
        known |= {
            "tail": torch.cat([tail, new.to(tail.dtype)], dim=2),
            "tail_columns": torch.cat([columns, at.expand(*columns.shape[:2], -1)], dim=2),
        }
        super().later(layer, state, call)

    def _best(
        self, state: LayerState, body: Body, q_hat: Float[Tensor, "batch heads 1 rank"]
    ) -> Int[Tensor, "batch heads count"]:
        """The tokens of largest A_K q̂ᵀ among the packed ones."""
        codes = state.tensors["codes"]
        scores = (codes @ q_hat.to(codes.dtype).mT)[..., 0]
        return best_portion(scores, self.portion, lengths_of(body))


def at_hand(
    known: dict[str, Tensor], body: Body, layer: StoredLayer, q: Float[Tensor, "batch heads 1 dim"]
) -> tuple[Float[Tensor, "batch heads 1 rank"], Float[Tensor, "batch heads rank rank"], int]:
    """(q K_Ωᵀ A_Ω, A_Ωᵀ A_Ω, bytes of keys read) over the recent tokens and those that were read last.

    A slot without a token has the code 0 and takes no part.
    """
    tail, keys = wide(known["tail"]), layer.keys
    assert keys is not None
    pull = grouped_product(q, wide(keys[:, :, : tail.shape[2]]).mT) @ tail
    gram = tail.mT @ tail
    if "last" not in known:
        return pull, gram, 0
    last = known["last"]
    read = keys_in(body.segment(last))
    codes = wide(taken(known["codes"], last.clamp(min=0))) * (last >= 0)[..., None]
    return (pull + q @ read.to(q.dtype).mT @ codes, gram + codes.mT @ codes, read.nbytes)


def keys_in(segment: Segment) -> Float[Tensor, "batch list_heads n dim"]:
    """The keys of the listed slots."""
    assert isinstance(segment, (Listed, Coded))
    assert segment.index is not None
    slots = segment.k.tokens if isinstance(segment, Coded) else segment.k.shape[2]
    at, _ = listed(segment.index, segment.page, slots, segment.lengths)
    return segment.k.gather(at) if isinstance(segment, Coded) else taken(segment.k, at)


def at_columns(
    known: dict[str, Tensor], columns: Int[Tensor, "rows kv_heads n"], rows: slice = slice(None)
) -> Float[Tensor, "rows heads n rank"]:
    """Codes that stand in the tail for the tokens of these columns; 0 where there is none."""
    tail, held = known["tail"][rows], known["tail_columns"][rows]
    if not held.shape[-1]:
        return tail.new_zeros(*tail.shape[:2], columns.shape[-1], tail.shape[-1])
    ordered, order = held.sort(dim=-1)
    at = torch.searchsorted(ordered, columns.contiguous()).clamp(max=held.shape[-1] - 1)
    found = (ordered.gather(-1, at) == columns) & (columns >= 0)
    groups = tail.shape[1] // held.shape[1]
    at, found = (x.repeat_interleave(groups, dim=1) for x in (order.gather(-1, at), found))
    return taken(tail, at) * found[..., None]
