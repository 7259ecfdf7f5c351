"""`attend`: exact attention by the fastest route that can take the call.

    out = softmax(score_mod(q kᵀ · scale), hidden pairs at −∞) · v

| route      | takes it when                                                                        |
|------------|--------------------------------------------------------------------------------------|
| reference  | always; all scores in memory                                                          |
| sdpa       | no score_mod or an additive one, no lse; its backend on a GPU chosen by measurement   |
| flex       | a pattern or a score_mod; on a GPU compiled, on a CPU without gradients               |
| blocks     | a pattern, no score_mod, no lse: SDPA on the visible blocks; a CPU's way for patterns |
| chunked    | always but dropout; O(√n) memory, visits no empty block                               |
| lists      | a pattern over `masks.pages`, no score_mod: `block_sparse` of what is listed            |
"""

from __future__ import annotations

from typing import Any, Literal, NoReturn, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attlas.errors import UnknownName
from attlas.masks import Mask, causal, density, hides_nothing
from attlas.masks.pages import holds_pages
from attlas.ops.backends import sdpa
from attlas.ops.block_reference import lists_of
from attlas.ops.block_sparse import listed
from attlas.ops.blocks import blocks
from attlas.ops.flex import flex, refuses
from attlas.ops.memory_efficient import memory_efficient
from attlas.ops.reference import as_dense, indices, reference, repeated
from attlas.ops.toeplitz import flex_biased, spread, table_of
from attlas.ops.toeplitz_kernels import refuses as kernel_refuses
from attlas.positions.base import ScoreMod, by_distance, captured
from attlas.tracing import any_length, traced

Route = Literal["auto", "reference", "sdpa", "flex", "blocks", "chunked", "lists"]
ROUTES: tuple[Route, ...] = ("auto", "reference", "sdpa", "flex", "blocks", "chunked", "lists")

#: Pairs below which all scores in memory cost less than any machinery.
SMALL = 1 << 16
#: Share of visible blocks above which a CPU's dense SDPA beats chunks that skip the empty ones.
DENSE = 0.6
#: Numbers up to which a GPU holds a bias of all pairs (8 GiB in float32), and one that is trained, of
#: which autograd keeps several.
HELD, TRAINED = 1 << 31, 1 << 28
#: Keys from which on compiling a FlexAttention kernel pays on a GPU.
LONG = 1024


@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | Tensor | None = ...,
    score_mod: ScoreMod | None = ..., scale: float | None = ..., dropout: float = ...,
    return_lse: Literal[False] = ..., q_offset: int | None = ..., route: Route = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attend(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | Tensor | None = ...,
    score_mod: ScoreMod | None = ..., scale: float | None = ..., dropout: float = ...,
    return_lse: Literal[True], q_offset: int | None = ..., route: Route = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attend(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch v_heads keys v_dim"],
    *,
    mask: Mask | Bool[Tensor, "b h #queries #keys"] | None = None,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    q_offset: int | None = None,
    route: Route = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q over k and v; `(out, lse)` with `return_lse`, for `merge`.

    Args:
        q: queries.
        k: keys; their heads divide the query heads (grouped-query attention).
        v: values; their heads divide the query heads.
        mask: a pattern, or booleans that broadcast to [batch, heads, queries, keys], True visible.
        score_mod: pointwise change of the scaled scores, as FlexAttention takes it.
        scale: of the products; 1/√dim unless given.
        dropout: share of weights dropped.
        return_lse: give log Σ exp(scores) [batch, heads, queries] too.
        q_offset: position of the first query; `keys - queries` unless given, so that the last query
            stands at the last key.
        route: "auto", or one route by name.

    Raises:
        ValueError: heads that do not divide, unequal widths or lengths, a mask that does not
            broadcast, or a route that cannot take the call.
    """
    # The common call, kept short: on a GPU a few microseconds of Python can be seen.
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if not len(q_shape) == len(k_shape) == len(v_shape) == 4:
        _refuse(q, k, v, dropout)
    _, heads, queries, dim = q_shape
    _, kv_heads, keys, k_dim = k_shape
    _, v_heads, values, _ = v_shape
    if dim != k_dim or keys != values or heads % kv_heads or heads % v_heads or not 0 <= dropout < 1:
        _refuse(q, k, v, dropout)
    offset = keys - queries if q_offset is None else q_offset
    if route == "auto" and score_mod is None and not return_lse and keys > 0:
        causally = mask is causal or (isinstance(mask, Mask) and mask == causal)
        flag = causally and offset == 0 and queries == keys
        alike = kv_heads == v_heads
        # The last query alone, as in a step of decoding, sees all keys.
        if mask is None or flag or (causally and offset >= keys - 1 and alike):
            if not alike:
                k, v = _alike(k, v, heads)
                v_shape, kv_heads = v.shape, heads
            # What has its default is left out: each keyword takes PyTorch a tenth of a microsecond.
            arguments: dict[str, Any] = {"is_causal": True} if flag else {}
            if dropout > 0:
                arguments["dropout_p"] = dropout
            if scale is not None:
                arguments["scale"] = scale
            if heads != kv_heads:
                arguments["enable_gqa"] = True
            return sdpa(q, k, v, arguments, q_shape, v_shape)
    return _routed(q, k, v, mask, score_mod, scale, dropout, return_lse, offset, route)


def _routed(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None, score_mod: ScoreMod | None,
    scale: float | None, dropout: float, return_lse: bool, offset: int, route: Route,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Any other call, by the route that is asked for or by the one that fits it."""
    queries, keys = q.shape[2], k.shape[2]
    _check_mask(mask, (q.shape[0], q.shape[1], queries, keys))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if keys == 0:
        out, lse = reference(q, k, v, scale=scale)
        return (out, lse) if return_lse else out
    if isinstance(mask, Mask) and route != "blocks" and not holds_pages(mask):
        mask = None if hides_nothing(mask, queries, keys, offset) else mask
    if route == "auto":
        route = _choose(q, k, v, mask, score_mod, dropout, return_lse, offset)
    elif route not in ROUTES:
        raise UnknownName("route", route, ROUTES)
    if dropout > 0 and route not in ("sdpa", "reference"):
        raise ValueError(f"route={route!r} has no dropout; use 'sdpa' or 'reference'")
    if route == "sdpa":
        return _sdpa(q, k, v, mask, score_mod, scale, dropout, offset, return_lse)
    if route == "lists":
        if score_mod is not None or not isinstance(mask, Mask) or not holds_pages(mask):
            raise ValueError("route='lists' takes a pattern over masks.pages, without score_mod")
        k, v = _alike(k, v, q.shape[1])
        of_queries, size, rest = lists_of(mask, queries, keys, offset, q.device)
        out, lse = listed(q, k, v, of_queries, size, rest, scale=scale, q_offset=offset)
        return (out, lse) if return_lse else out
    if route == "blocks":
        if return_lse or score_mod is not None or not isinstance(mask, Mask):
            raise ValueError("route='blocks' takes a pattern alone, without score_mod or lse")
        return blocks(q, k, v, mask=mask, scale=scale, q_offset=offset)
    if route == "reference":
        result = reference(
            q, k, v, scale=scale, mask=mask, score_mod=score_mod, dropout=dropout, q_offset=offset
        )
    elif route == "chunked":
        result = memory_efficient(
            q, k, v, mask=mask, score_mod=score_mod, scale=scale, q_offset=offset
        )
    else:
        if (reason := refuses(q, k, v, mask)) is not None:
            raise ValueError(f"route='flex' cannot take this call: {reason}")
        assert not isinstance(mask, Tensor)
        table = table_of(score_mod, q, keys, offset)
        if table is not None:
            result = flex_biased(q, k, v, table, mask=mask, scale=scale, q_offset=offset)
        else:
            result = flex(q, k, v, mask=mask, score_mod=score_mod, scale=scale, q_offset=offset)
    return result if return_lse else result[0]


def _choose(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None, score_mod: ScoreMod | None,
    dropout: float, return_lse: bool, offset: int,
) -> Route:  # fmt: skip
    queries, keys = q.shape[2], k.shape[2]
    # An exported program is for every length, so that none may decide.
    small = any_length(queries) or any_length(keys) or queries * keys <= SMALL
    fits_sdpa = not return_lse and (score_mod is None or getattr(score_mod, "additive", False))
    if dropout > 0:
        return "sdpa" if fits_sdpa else "reference"
    if traced():
        return _choose_traced(q, k, v, mask, fits_sdpa, small)
    if score_mod is None and not small and isinstance(mask, Mask) and holds_pages(mask):
        return "lists"
    # Nothing may be compiled for a change of scores of this call alone. To what is trained of one that
    # is no bias of distances FlexAttention adds pair by pair, forty times as slowly.
    trained = score_mod is not None and torch.is_grad_enabled()
    trained = trained and any(t.requires_grad for t in captured(score_mod))
    by_pair = trained and (by_distance(score_mod) is None or kernel_refuses(q, k, v) is not None)
    own = getattr(score_mod, "of_call", False) or (fits_sdpa and by_pair)
    if q.is_cuda and score_mod is None and fits_sdpa and _lower_right(mask, queries, keys, offset):
        return "sdpa"  # FlexAttention would compile for every length that a text has had by then
    flexible = q.is_cuda and keys >= LONG and queries > 1 and not own
    if flexible and refuses(q, k, v, mask) is None:
        return "flex"
    if fits_sdpa and not small and _sparse(mask, queries, keys, offset):
        if score_mod is None:
            return "blocks"
        if not q.is_cuda:
            return "chunked"
    # Where one query comes with a mask, SDPA's kernels leave most of the device idle.
    plain = score_mod is None and mask is None and k.shape[1] == v.shape[1]
    if q.is_cuda and queries == 1 and not plain:
        return "reference"
    # A bias as one dense mask takes n² memory, and on a CPU longer than making it chunk by chunk.
    held = q.is_cuda and q.shape[1] * queries * keys <= (TRAINED if trained else HELD)
    if fits_sdpa and (score_mod is None or small or held):
        return "sdpa"
    return "reference" if small else "chunked"


def _choose_traced(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None, fits_sdpa: bool, small: bool
) -> Route:
    """The route where no block can be looked at: compiled whole, exported, or under torch.func."""
    fixed = mask is None or (isinstance(mask, Mask) and len(mask.leaves) == 0)
    flexible = torch.compiler.is_compiling() and q.is_cuda and fixed and not small
    if flexible and refuses(q, k, v, mask) is None:
        return "flex"
    if fits_sdpa:
        return "sdpa"
    return "reference" if small or not torch.compiler.is_compiling() else "chunked"


def _lower_right(mask: Mask | Tensor | None, queries: int, keys: int, offset: int) -> bool:
    """Whether new tokens see all keys up to their own, which FlashAttention takes without a mask."""
    behind = 1 < queries < keys and offset == keys - queries and not traced()
    return behind and isinstance(mask, Mask) and mask == causal


def _sparse(mask: Mask | Tensor | None, queries: int, keys: int, offset: int) -> bool:
    """Whether a pattern leaves enough blocks empty for visiting only the others to win."""
    return isinstance(mask, Mask) and density(mask, queries, keys, offset) < DENSE


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None, score_mod: ScoreMod | None,
    scale: float, dropout: float, offset: int, return_lse: bool,
) -> Tensor:  # fmt: skip
    if return_lse:
        raise ValueError("route='sdpa' gives no lse; use 'flex', 'chunked' or 'reference'")
    if score_mod is not None and not getattr(score_mod, "additive", False):
        raise ValueError("route='sdpa' takes additive score_mods alone (see attlas.positions)")
    if q.is_cuda and score_mod is None and _lower_right(mask, q.shape[2], k.shape[2], offset):
        return _behind(q, *_alike(k, v, q.shape[1]), scale, dropout)
    flags: dict[str, Any]
    whole = offset == 0 and q.shape[2] == k.shape[2]
    if score_mod is None and whole and isinstance(mask, Mask) and mask == causal:
        flags = {"is_causal": True}
    else:  # patterns that hide nothing are gone by now
        seen = as_dense(mask, q.shape[2], k.shape[2], offset, q.device)
        flags = {"attn_mask": seen if score_mod is None else _bias(q, k, score_mod, offset, seen)}
    k, v = _alike(k, v, q.shape[1])
    flags |= {"dropout_p": dropout, "scale": scale}
    if q.shape[1] != k.shape[1]:
        flags["enable_gqa"] = True
    out = sdpa(q, k, v, flags, q.shape, v.shape)
    seen = flags.get("attn_mask")
    # SDPA's kernels disagree on rows that see nothing (NaN, or a mean of the values): here it is 0.
    if isinstance(seen, Tensor):
        dead = (
            ~seen.any(-1, keepdim=True)
            if seen.dtype == torch.bool
            else seen.amax(-1, True) == -torch.inf
        )
        out = out.masked_fill(dead, 0.0)
    return out


def _behind(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
    """Causal attention of the last tokens, by PyTorch's own FlashAttention."""
    from torch.nn.attention.bias import causal_lower_right  # which brings the compiler with it

    return scaled_dot_product_attention(
        q, k, v, causal_lower_right(q.shape[2], k.shape[2]), dropout, scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


def _alike(k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values with one number of heads, which SDPA needs."""
    if k.shape[1] == v.shape[1]:
        return k, v
    return repeated(k, heads), repeated(v, heads)


def _bias(q: Tensor, k: Tensor, score_mod: ScoreMod, offset: int, visible: Tensor | None) -> Tensor:
    """An additive score_mod as the mask of numbers that SDPA takes."""
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    table = None if queries == 1 or traced() else table_of(score_mod, q, keys, offset)
    if table is not None:
        bias = spread(table, queries, keys, offset)
    else:
        zeros = q.new_zeros(1).expand(batch, heads, queries, keys)
        bias = score_mod(q.new_zeros(1), *indices(zeros, offset))
    if visible is not None:
        bias = torch.where(visible, bias, -torch.inf)
    return bias.to(q.dtype)


def _refuse(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> NoReturn:
    """Tell what does not fit."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q, k, v take [batch, heads, tokens, dim], got {q.ndim}, {k.ndim} and {v.ndim} axes"
        )
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"k must be as wide as q ({q.shape[-1]}), got {k.shape[-1]}")
    if k.shape[2] != v.shape[2]:
        raise ValueError(f"v must have as many tokens as k ({k.shape[2]}), got {v.shape[2]}")
    for name, x in (("k", k), ("v", v)):
        if q.shape[1] % x.shape[1]:
            raise ValueError(
                f"heads of {name} ({x.shape[1]}) must divide those of q ({q.shape[1]})"
            )
    raise ValueError(f"dropout must lie in [0, 1), got {dropout}")


def _check_mask(mask: Mask | Tensor | None, wanted: tuple[int, int, int, int]) -> None:
    if isinstance(mask, Mask):
        if mask.heads not in (None, 1, wanted[1]):
            raise ValueError(f"mask is for {mask.heads} heads, q has {wanted[1]}")
    elif mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError("mask takes an attlas.masks.Mask or a boolean tensor, True visible")
        if mask.ndim != 4 or any(m not in (1, w) for m, w in zip(mask.shape, wanted, strict=True)):
            raise ValueError(f"mask must broadcast to {wanted}, got {tuple(mask.shape)}")
