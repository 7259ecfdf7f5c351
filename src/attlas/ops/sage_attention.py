"""SageAttention2: attention in 4 or 8 bits, after what is common to all tokens has been taken out.

    K' = K − k̄    Q' = Q − q̄_b                    k̄: mean of all keys, q̄_b: mean of a block of queries
    Q ≈ δ_q Q̂,  K' ≈ δ_k K̂                        integers; δ = max|x| / (2^(bits−1) − 1) in a group
    S = (δ_q δ_k Q̂ K̂ᵀ + q̄_b K'ᵀ) · scale          the second term only where queries are smoothed
    P = 2^(S log₂e − m + log₂ 448)  in FP8         V' = V − v̄ ≈ δ_v V̂  in FP8, δ_v = max|V'| / 448
    O = δ_v (P V̂) / Σ P + v̄                        m: running maximum of a row, Σ P before rounding

Means cost nothing: q k̄ᵀ is the same for all keys of a row, so softmax does not see it, and the other two
are added back. Without bits this is exact attention. A group is a block of tokens, or what one thread of
a tensor core holds: of a run of queries those whose places agree modulo 8, of a run of keys pairs of
neighbours modulo 8. Integers round halves away from zero.

Cost: n² products in 8 bits; the plain form here computes the same numbers in float32, a block of keys at
a time. The kernels (`attlas.kernels.sage`) take half precision, heads of 64 or 128, no smoothed queries:
their correction is n² / block numbers, and GPUs from the H100 on multiply no 4-bit integers.
Reduces to exact attention with bits and values both None.
Source: "SageAttention2 Technical Report: Accurate 4 Bit Attention for Plug-and-play Inference
Acceleration".
"""

from __future__ import annotations

from math import e, log, log2
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int8
from torch import Tensor

from attlas.catalog.kinds import OP
from attlas.catalog.registry import mechanism
from attlas.errors import UnknownName, at_least_one
from attlas.masks import Mask, at, causal, hides_nothing
from attlas.ops.decode_kernels import has_kernels
from attlas.ops.exact import exact, wide
from attlas.ops.reference import divided, grouped_product, repeated

#: Largest integer of so many bits, and largest number of FP8 (e4m3).
LARGEST = {4: 7, 8: 127}
FP8 = 448.0
#: What values and weights are rounded to, and how far weights are scaled up before, as a power of two.
VALUES = {"fp8": (torch.float8_e4m3fn, log2(FP8)), "fp16": (torch.float16, 0.0)}
#: Added to the scales of threads' groups, which may hold no token.
TINY = 1e-7

#: Keys that share scales where the kernels take them; no more queries do.
RUNS = (8, 16, 32, 64, 128, 256)

Route = Literal["auto", "reference", "kernel"]


class Integers(NamedTuple):
    """Tokens as integers: their codes, the scale of each group, and of each token."""

    codes: Int8[Tensor, "batch heads tokens dim"]
    scales: Float[Tensor, "batch heads groups"]
    each: Float[Tensor, "batch heads tokens"]


def quantise(
    x: Float[Tensor, "batch heads tokens dim"], bits: int, run: int, *, groups: int = 1, near: int = 1
) -> Integers:
    """Integers of −(2^(bits−1) − 1) to 2^(bits−1) − 1.

    Args:
        x: queries or keys.
        bits: 4 or 8.
        run: tokens to a run; rows that miss in the last one count as 0.
        groups: of a run: token t of it is in group t // near mod groups.
        near: neighbours in the same group.
    """
    x = wide(x)
    missing = -x.shape[2] % run
    whole = torch.nn.functional.pad(x, (0, 0, 0, missing))
    runs = whole.unflatten(2, (-1, run // groups // near, groups, near))
    scales = runs.abs().amax(dim=(3, 5, 6)).flatten(2) / LARGEST[bits]
    scales = scales + TINY if groups > 1 else scales
    token = torch.arange(x.shape[2], device=x.device)
    each = scales[:, :, token // run * groups + token // near % groups]
    units = divided(x, each[..., None])
    return Integers((units + torch.where(units >= 0, 0.5, -0.5)).to(torch.int8), scales, each)


@mechanism("sage-attention-2", kind=OP)
@exact
def sage_attention(
    q: Float[Tensor, "batch heads queries dim"],
    k: Float[Tensor, "batch kv_heads keys dim"],
    v: Float[Tensor, "batch kv_heads keys v_dim"],
    *,
    mask: Mask | Bool[Tensor, "b h queries keys"] | None = None,
    scale: float | None = None,
    q_offset: int | None = None,
    bits: Literal[4, 8] | None = 4,
    values: Literal["fp8", "fp16"] | None = "fp8",
    per: Literal["thread", "block"] = "thread",
    smooth_q: bool | None = None,
    smooth_k: bool = True,
    smooth_v: bool = True,
    q_block: int = 128,
    k_block: int = 64,
    q_run: int = 32,
    k_run: int = 64,
    route: Route = "auto",
) -> tuple[Float[Tensor, "batch heads queries v_dim"], Float[Tensor, "batch heads queries"]]:
    """(out, lse) of attention in few bits. Keys that a mask hides still take part in means and scales.

    Args:
        q: queries.
        k: keys; their heads divide the query heads.
        v: values.
        mask: pattern or booleans, True visible.
        scale: of the products; 1/√dim unless given.
        q_offset: position of the first query; `keys - queries` unless given.
        bits: of queries and keys; None leaves them as they are.
        values: what weights and values are rounded to; None leaves them as they are.
        per: what shares a scale: "thread", or a "block" of q_block queries or k_block keys.
        smooth_q: take out the mean of each q_block queries; with 4 bits unless given.
        smooth_k: take out the mean of all keys.
        smooth_v: take out the mean of all values; with rounded values alone.
        q_block: queries of a block.
        k_block: keys of a block, after which weights are rounded.
        q_run: queries of a run, of which each eighth shares a scale.
        k_run: keys of a run, of which each quarter shares a scale.
        route: "kernel" or "reference"; the kernel where it takes the call unless given.

    Raises:
        ValueError: an option that is not offered, runs that are no multiple of 8, inputs that want
            gradients, or a call that the named route cannot take.
    """
    smooth_q = bits == 4 if smooth_q is None else smooth_q
    _check(q, k, v, mask, bits, values, per, q_block, k_block, q_run, k_run)
    if route not in get_args(Route):
        raise UnknownName("route", route, get_args(Route))
    keys, queries = k.shape[2], q.shape[2]
    offset = keys - queries if q_offset is None else q_offset
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(mask, Mask) and hides_nothing(mask, queries, keys, offset):
        mask = None
    runs = (q_block, k_block) if per == "block" else (q_run, k_run)
    reason = "" if route == "reference" else refuses(
        q, k, v, mask, bits, values, smooth_q, runs, scale
    )  # fmt: skip
    if route == "kernel" and reason is not None:
        raise ValueError(f"route='kernel' cannot take this call: {reason}")
    if keys == 0 or 0 in q.shape:
        return q.new_zeros(*q.shape[:3], v.shape[3]), wide(q.new_full(q.shape[:3], -torch.inf))

    if reason is None:
        assert bits is not None
        return _by_kernels(q, k, v, mask, scale, offset, bits, values, per, smooth_k, smooth_v, runs)
    k_mean = wide(k).mean(2, keepdim=True) if smooth_k else None
    smooth = wide(k) if k_mean is None else wide(k) - k_mean
    factor = scale * log2(e)
    rows, added = wide(q), None
    if smooth_q:
        rows, added = _smoothed_queries(rows, smooth, q_block, factor)
    v_codes, v_scale, v_mean = _rounded_values(v, values, smooth_v)
    common = None
    if k_mean is not None:  # what softmax does not see, the sum of exponentials does
        common = grouped_product(wide(q), k_mean.mT)[..., 0] * scale
    if bits is None:
        codes, columns, unit = rows, smooth, smooth.new_ones(1)
        row_scale, column_scale = unit * factor, unit
    else:
        ours, theirs = _integers(rows, smooth, bits, per, factor, *runs)
        row_scale = ours.each * (1.0 if per == "block" else factor)
        codes, columns, column_scale = ours.codes, theirs.codes, theirs.each
    out, lse = _reference(
        codes, columns, v_codes, row_scale, column_scale, added, q_block, mask, offset, values, k_block
    )
    out = out * repeated(v_scale, q.shape[1])
    if v_mean is not None:
        seen = (lse != -torch.inf)[..., None]
        out = torch.where(seen, out + repeated(v_mean, q.shape[1]), out)
    return out.to(q.dtype), lse if common is None else lse + common


def _by_kernels(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None, scale: float, offset: int, bits: int,
    values: str | None, per: str, smooth_k: bool, smooth_v: bool, runs: tuple[int, int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of a call that `refuses` gives no reason against."""
    from attlas.kernels.sage import sage_forward
    from attlas.kernels.sage_codes import Bits, coded

    made = Bits(LARGEST[bits], values == "fp8", per == "thread", *runs, smooth_k, smooth_v, TINY)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        found: tuple[Tensor, Tensor] = sage_forward(
            coded(q, k, v, scale, log2(e), made), causal=mask is not None, offset=offset,
            lift=VALUES[values or "fp16"][1], out_dtype=q.dtype,
        )  # fmt: skip
    return found


def _integers(
    q: Tensor, k: Tensor, bits: int, per: str, factor: float, q_size: int, k_size: int
) -> tuple[Integers, Integers]:
    """Queries, with the factor in them where scales are those of blocks, and keys."""
    if per == "block":
        return quantise(q * factor, bits, q_size), quantise(k, bits, k_size)
    return quantise(q, bits, q_size, groups=8), quantise(k, bits, k_size, groups=4, near=2)


def _smoothed_queries(q: Tensor, k: Tensor, block: int, factor: float) -> tuple[Tensor, Tensor]:
    """Queries less the mean of their block, and what those means add to the scores of each block."""
    missing, token = -q.shape[2] % block, torch.arange(q.shape[2], device=q.device)
    sums = torch.nn.functional.pad(q, (0, 0, 0, missing)).unflatten(2, (-1, block)).sum(3)
    means = sums / (q.shape[2] - token[::block, None]).clamp(max=block)
    return q - means[:, :, token // block], grouped_product(means * factor, k.mT)


def _rounded_values(v: Tensor, kind: str | None, smooth: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(values, their scale, the mean that was taken out), the last two [batch, heads, 1, dim]."""
    x = wide(v)
    if kind is None:
        return x, x.new_ones(*x.shape[:2], 1, x.shape[3]), None
    mean = x.mean(2, keepdim=True) if smooth else None
    x = x if mean is None else x - mean
    if kind == "fp16":
        return x.half(), x.new_ones(*x.shape[:2], 1, x.shape[3]), mean
    most = x.abs().amax(2, keepdim=True)
    return divided(x * FP8, most).clamp(-FP8, FP8).to(VALUES[kind][0]), most / FP8, mean


def _reference(
    q: Tensor, k: Tensor, v: Tensor, row_scale: Tensor, column_scale: Tensor, added: Tensor | None,
    q_block: int, mask: Mask | Tensor | None, offset: int, kind: str | None, block: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(sum over values as they are held, lse), a block of keys at a time as the kernel goes; `added` to
    the scores of each q_block queries."""
    batch, heads, queries, _ = q.shape
    dtype = torch.promote_types(row_scale.dtype, torch.float32)
    column_scale = column_scale.expand(*k.shape[:3])
    row_scale = row_scale.expand(*q.shape[:3])
    top = row_scale.new_full((batch, heads, queries), -torch.inf)
    total, summed = torch.zeros_like(top), row_scale.new_zeros(batch, heads, queries, v.shape[3])
    positions = torch.arange(queries, device=q.device)
    rounded, lift = (dtype, 0.0) if kind is None else VALUES[kind]
    for start in range(0, k.shape[2], block):
        run = slice(start, min(start + block, k.shape[2]))
        # Sums of products of such integers are below 2²⁴: float32 holds them exactly.
        scores = grouped_product(q.to(dtype), k[:, :, run].to(dtype).mT)
        scores = scores * repeated(column_scale[:, :, run], heads)[:, :, None] * row_scale[..., None]
        if added is not None:
            scores = scores + added[:, :, positions // q_block, run]
        if mask is not None:
            scores = scores.masked_fill(~_visible(mask, positions + offset, run), -torch.inf)
        higher = torch.maximum(top, scores.amax(-1))
        # A row that has seen nothing keeps −∞; subtracting 0 there avoids −∞ − (−∞).
        base = higher.masked_fill(higher == -torch.inf, 0.0)
        weights, shrink = (scores - (base - lift)[..., None]).exp2(), (top - base).exp2()
        total = total * shrink + weights.sum(-1)
        held = weights.to(rounded).to(dtype)
        summed = summed * shrink[..., None] + grouped_product(held, v[:, :, run].to(dtype))
        top = higher
    return divided(summed, total[..., None]), (top + total.log2() - lift) * log(2)


def _visible(mask: Mask | Tensor, q: Tensor, run: slice) -> Tensor:
    if isinstance(mask, Mask):
        return at(mask, q, torch.arange(run.start, run.stop, device=q.device))
    return mask if mask.shape[-1] == 1 else mask[..., run]


def refuses(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None, bits: int | None, values: str | None,
    smooth_q: bool, runs: tuple[int, int], scale: float,
) -> str | None:  # fmt: skip
    """Why the kernel cannot take a call, None when it can."""
    if torch.compiler.is_compiling():
        return "torch.compile traces it"
    if not q.is_cuda:
        return f"q is on {q.device}, not on a CUDA device"
    if bits is None or values is None:
        return f"bits={bits} and values={values!r}: it takes rounded numbers alone"
    if smooth_q:
        return "smooth_q=True, whose correction it does not add"
    if mask is not None and not (isinstance(mask, Mask) and mask == causal):
        return "mask is neither None nor causal"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"q is {q.dtype}, neither float16 nor bfloat16"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}"
    if q.shape[-1] != v.shape[-1] or q.shape[-1] not in (64, 128):
        return f"heads are {q.shape[-1]} and {v.shape[-1]} wide, not both 64 or both 128"
    if not (runs[1] in RUNS and runs[0] <= RUNS[-1]):
        return f"runs of {runs[0]} queries and {runs[1]} keys, not up to {RUNS[-1]} and one of {RUNS}"
    if scale < 0.0:
        return f"scale is {scale}, below 0"
    if not has_kernels(q.device):
        return "there is no Triton for the device"
    if values == "fp8" and torch.cuda.get_device_capability(q.device) < (8, 9):
        return "the device has no FP8 products (compute capability 8.9)"
    return None


def _check(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask | Tensor | None, bits: int | None, values: str | None,
    per: str, q_block: int, k_block: int, q_run: int, k_run: int,
) -> None:  # fmt: skip
    for name, x in (("q", q), ("k", k), ("v", v)):
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{name} wants a gradient, which numbers rounded to few bits have not")
    if bits is not None and bits not in LARGEST:
        raise ValueError(f"bits takes 4, 8 or None, got {bits!r}")
    if values is not None and values not in VALUES:
        raise UnknownName("values", values, VALUES)
    if per not in ("thread", "block"):
        raise UnknownName("per", per, ("thread", "block"))
    for name, size in (("q_block", q_block), ("k_block", k_block), ("q_run", q_run), ("k_run", k_run)):
        if at_least_one(name, size) % 8 and name.endswith("run"):
            raise ValueError(f"{name} takes a multiple of 8, got {size}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"k has {k.shape[1]} heads, which do not divide the {q.shape[1]} of q")
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        raise ValueError(f"mask takes a pattern or booleans, got {mask.dtype}")
