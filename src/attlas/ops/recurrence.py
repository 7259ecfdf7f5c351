"""Linear recurrences: a state of keys against values, read by queries.

    S_t = (diag(α_t) + a_t b_tᵀ) S_{t−1} + k_t v_tᵀ        y_t = scale · S_tᵀ q_t

| update          | α_t                         | a_t, b_t                | k_t        |
|-----------------|-----------------------------|-------------------------|------------|
| additive        | e^g, or 1                   | none                    | k_t        |
| (gated) delta   | e^g, or 1                   | −β_t k_t,  α_t ⊙ k_t    | β_t k_t    |
| low rank        | e^g, or 1                   | given                   | k_t        |

g, the logarithm of the decay, is one number a head, one a token and head, or one a token and channel.
The delta rule so reads S_t = (I − β_t k_t k_tᵀ) diag(α_t) S_{t−1} + β_t k_t v_tᵀ: what stood under a key
is replaced, not added to. RWKV-7 is the low-rank form with a_t = −κ̂_t, b_t = κ̂_t ⊙ η_t.

The forms give the same:

| form     | what it is                                                           | "auto" takes it  |
|----------|----------------------------------------------------------------------|------------------|
| step     | the definition, token by token                                       | for a few tokens |
| parallel | one chunk of everything, quadratic in its length                     | for any length   |
| chunked  | products within a chunk, the state from chunk to chunk               | else             |
| triton   | kernels with chunks of their own, in bfloat16 on a GPU               | wherever it can  |

A program that torch.export makes for any length has no loop over chunks, which a length would count.

All but the kernels compute in float32 at least, so that nothing overflows where inputs are in half
precision; the kernels keep their state in float32. A decay of heads beside a low-rank update goes by
chunks where its gradient is wanted, since the kernels' gradient of it is coarse.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas.errors import UnknownName, UserError
from attlas.ops import recurrence_kernels as kernels
from attlas.ops.exact import exact
from attlas.ops.recurrence_forms import Terms, chunked, stepped
from attlas.ops.reference import divided
from attlas.tracing import any_length, traced

Form = Literal["auto", "parallel", "chunked", "step", "triton"]
#: Calls shorter than this are made step by step.
SHORT = 4


@exact
def recurrence(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch heads keys dim"],
    v: Float[Tensor, "batch heads keys v_dim"],
    *,
    log_decay: Float[Tensor, ...] | None = None,
    beta: Float[Tensor, "batch heads tokens"] | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    normalize: bool = False,
    eps: float = 0.0,
    causal: bool = True,
    initial_state: Float[Tensor, "sequences heads dim v_width"] | None = None,
    cu_seqlens: Int[Tensor, " offsets"] | None = None,
    chunk_size: int | None = None,
    form: Form = "auto",
) -> tuple[
    Float[Tensor, "batch heads tokens v_dim"], Float[Tensor, "sequences heads dim v_width"] | None
]:
    """(outputs, the state behind the last token).

    Args:
        q: queries.
        k: keys, as many heads as queries, and as many tokens but where nothing is causal nor decays.
        v: values.
        log_decay: g ≤ 0, of shape [heads], [batch, heads, tokens] or [batch, heads, tokens, dim]; −∞
            forgets everything. None for no decay.
        beta: strength of the delta rule's writing; None for the additive update.
        low_rank: (a, b), each [batch, heads, tokens, dim], instead of `beta`.
        scale: factor of outputs.
        normalize: divide by the same recurrence of ones, Σ of what weighs the values; the state then has
            one column more. Where the sum is 0, so is the output.
        eps: added to that sum.
        causal: whether a token sees none behind it. Without, each sees all: of two tokens i < j the
            weight of j at i decays by g_i … g_{j−1}, of i at j by g_{i+1} … g_j. Additive update only.
        initial_state: before the first token; zeros unless given. One for each packed sequence.
        cu_seqlens: offsets of packed sequences in a batch of one: 0, …, tokens, ascending.
        chunk_size: tokens of a chunk, a power of two; 64 unless given, and 32 where a chunk has
            equations to solve, whose rounding grows with it.
        form: "auto", or one form by name.

    Returns:
        Outputs in the type of v, and the state in float32 (float64 where inputs are); no state
        without `causal`.

    Raises:
        ValueError: shapes that do not go together, a decay above 0, a chunk size that is no power of
            two, offsets out of order, `causal=False` with anything but an additive update, or a form
            that cannot take the call.
    """
    width = v.shape[-1]
    if chunk_size is None:
        chunk_size = 64 if beta is None and low_rank is None else 32
    if form == "auto" and any_length(q.shape[2]):
        form = "parallel"
    _check(q, k, v, log_decay, beta, low_rank, causal, initial_state, chunk_size, form)
    if normalize:
        v = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], dim=-1)
    spans = _spans(q, cu_seqlens)
    sequences = q.shape[0] if cu_seqlens is None else len(spans)
    expected = (sequences, q.shape[1], q.shape[-1], v.shape[-1])
    if initial_state is not None and initial_state.shape != expected:
        raise UserError(
            f"initial_state must be {list(expected)} (sequences, heads, dim, v_dim"
            f"{' + 1' if normalize else ''}), got {list(initial_state.shape)}"
        )
    packed = cu_seqlens is not None
    state: Tensor | None
    if _by_kernel(q, k, v, log_decay, low_rank, causal, form):
        out, state = kernels.launch(
            q, k, v, log_decay, beta, low_rank, initial_state, scale, spans, packed, causal
        )
    else:
        terms = _terms(q, k, v, log_decay, beta, low_rank, scale)
        out, state = _by_forms(terms, spans, packed, causal, initial_state, chunk_size, form)
    if normalize:
        total = out[..., width:] + eps
        out = divided(out[..., :width], total)
    return out.to(v.dtype), state


def _by_kernel(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, low_rank: tuple[Tensor, Tensor] | None,
    causal: bool, form: Form,
) -> bool:  # fmt: skip
    if form != "triton" and (form != "auto" or q.shape[2] < SHORT or kernels.loses(g, low_rank)):
        return False
    reason = kernels.refuses(q, k, v, g, causal)
    if reason is not None and form == "triton":
        raise UserError(f"form='triton' cannot take this call: {reason}")
    return reason is None


def _by_forms(
    terms: Terms, spans: list[tuple[int, int]], packed: bool, causal: bool, start: Tensor | None,
    chunk_size: int, form: Form,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    if not causal and terms.g is None and not packed:
        return terms.q @ (terms.k.mT @ terms.v), None
    if not causal:
        return _both_ways(terms, spans, chunk_size, form), None
    found = []
    for n, (begin, stop) in enumerate(spans):
        rows = slice(n, n + 1) if packed else slice(None)
        before = None if start is None else start[rows].to(terms.q.dtype)
        found.append(_run(terms.part(begin, stop), before, chunk_size, form))
    outs, states = zip(*found, strict=True)
    return torch.cat(outs, dim=2), torch.cat(states, dim=0)


def _run(
    terms: Terms, state: Tensor | None, chunk_size: int, form: Form
) -> tuple[Tensor, Tensor]:
    tokens = terms.q.shape[2]
    if state is None:
        shape = (*terms.q.shape[:2], terms.q.shape[-1], terms.v.shape[-1])
        state = terms.q.new_zeros(shape)
    if form == "step" or (form == "auto" and tokens < SHORT):
        return stepped(terms, state)
    return chunked(terms, state, max(1, tokens) if form == "parallel" else chunk_size)


def _both_ways(
    terms: Terms, spans: list[tuple[int, int]], chunk_size: int, form: Form
) -> Tensor:
    """Forwards and backwards, the token itself once."""
    found = []
    for start, stop in spans:
        part = terms.part(start, stop)
        ahead = _run(part, None, chunk_size, form)[0]
        back = _run(part.flipped(), None, chunk_size, form)[0].flip(2)
        found.append(ahead + back - (part.q * part.k).sum(-1, keepdim=True) * part.v)
    return torch.cat(found, dim=2)


def _terms(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None, scale: float,
) -> Terms:  # fmt: skip
    """Everything in float32 at least, the delta rule as a low-rank update."""
    wide = torch.promote_types(torch.promote_types(q.dtype, v.dtype), torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    q = q if scale == 1.0 else q * scale
    g = None if log_decay is None else _decay(log_decay, q)
    if beta is not None:
        written = beta.to(wide)[..., None] * k
        return Terms(q, written, v, g, -written, k if g is None else k * g.exp().to(wide))
    a, b = (None, None) if low_rank is None else (x.to(wide) for x in low_rank)
    return Terms(q, k, v, g, a, b)


def _decay(g: Tensor, q: Tensor) -> Float[Tensor, "batch heads tokens dim_or_1"]:
    """Logarithms in float64, since differences of long sums of them are taken."""
    batch, heads, tokens, dim = q.shape
    takes = ((heads,), (batch, heads, tokens), (batch, heads, tokens, dim))
    if tuple(g.shape) not in takes:
        raise UserError(
            f"log_decay must be [{heads}], [{batch}, {heads}, {tokens}] or "
            f"[{batch}, {heads}, {tokens}, {dim}], got {list(g.shape)}"
        )
    # The check waits for the device, so it is made where that costs nothing.
    if g.device.type == "cpu" and not traced() and not bool((g <= 0).all()):
        raise UserError(f"log_decay must be at most 0, got {float(g.max())}")
    found = g[None, :, None, None] if g.ndim == 1 else g if g.ndim == 4 else g[..., None]
    return found.expand(batch, heads, tokens, found.shape[-1]).double()


def _spans(q: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, int]]:
    tokens = q.shape[2]
    if cu_seqlens is None:
        return [(0, tokens)]
    offsets = cu_seqlens.tolist()
    fits = len(offsets) > 1 and offsets[0] == 0 and offsets[-1] == tokens
    if q.shape[0] != 1 or not fits or offsets != sorted(offsets):
        raise UserError(
            f"cu_seqlens must ascend from 0 to the {tokens} tokens of a batch of one, got {offsets} "
            f"for a batch of {q.shape[0]}"
        )
    return list(pairwise(offsets))


def _check(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None, causal: bool, initial_state: Tensor | None,
    chunk_size: int, form: str,
) -> None:  # fmt: skip
    apart = not causal and log_decay is None  # then keys may be another sequence's
    if (k.shape[:2] + k.shape[3:] != q.shape[:2] + q.shape[3:]) if apart else k.shape != q.shape:
        raise UserError(f"k must be of q's shape {list(q.shape)}, got {list(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise UserError(f"v must begin as k, {list(k.shape[:3])}, got {list(v.shape)}")
    if form not in get_args(Form):
        raise UnknownName("form", form, get_args(Form))
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        raise UserError(f"chunk_size must be a power of two, got {chunk_size}")
    if beta is not None and beta.shape != q.shape[:3]:
        raise UserError(f"beta must be {list(q.shape[:3])}, got {list(beta.shape)}")
    if beta is not None and low_rank is not None:
        raise UserError("beta makes a low-rank update of its own; give beta or low_rank")
    for name, x in zip("ab", low_rank or (), strict=False):
        if x.shape != q.shape:
            raise UserError(f"{name} of low_rank must be of q's shape, got {list(x.shape)}")
    if causal:
        return
    if beta is not None or low_rank is not None:
        raise UserError("causal=False takes the additive update; others have an order")
    if initial_state is not None:
        raise UserError("causal=False has no first token that initial_state could stand before")
