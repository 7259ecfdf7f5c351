"""Attention in very many short windows: all pairs of one are held at once, channels come in tiles.

    S = Σ_tiles q kᵀ · scale + bias + mask      P = softmax(S)      out_tile = P v_tile

A program has one window of one head at a time. Its pairs, 64² for windows of 7 × 7 or 8 × 8 tokens, stay
in registers, so that softmax is done once, and nothing of the pairs is written. The backward pass makes
P again and goes through the tiles twice:

    dP = Σ_tiles dO vᵀ      dV_tile = Pᵀ dO_tile      dS = P ∘ (dP − rowsum(P ∘ dP))
    dQ_tile = dS k_tile · scale      dK_tile = dSᵀ q_tile · scale      dB = Σ_windows dS

For dB a program takes several windows of its head and adds them up; each writes one sum of its own, so
that the result is the same each time.

Cost: 4·N²·d operations a window, and 10·N²·d backwards; q, k, v and the output are read or written once,
backwards twice.
"""

# ruff: noqa: N803  (in Triton, capitals are what a kernel is compiled for)

from __future__ import annotations

from typing import no_type_check

import triton  # type: ignore[import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, unused-ignore]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
@no_type_check
def _tile(x, x_t, first, tokens, width: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """D channels of all tokens of a window from `first` on, zeros beyond both."""
    t, d = tl.arange(0, N), first + tl.arange(0, D)
    inside = (t < tokens)[:, None] & (d < width)[None, :]
    return tl.load(x + t[:, None] * x_t + d[None, :], mask=inside, other=0.0)


@triton.jit
@no_type_check
def _put(x, value, x_t, first, tokens, width: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    """Write D channels of all tokens of a window."""
    t, d = tl.arange(0, N), first + tl.arange(0, D)
    inside = (t < tokens)[:, None] & (d < width)[None, :]
    tl.store(x + t[:, None] * x_t + d[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def _pairs(x, tokens, N: tl.constexpr):
    """Numbers of all pairs of a window, [tokens, tokens] behind one another."""
    t, s = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    return tl.load(x + t * tokens + s, mask=(t < tokens) & (s < tokens), other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def _weights(
    q, k, bias, mask, q_t, k_t, tokens, scale, dk: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """e^(S − its row's largest), and the rows' sums: 1 where a row sees nothing, whose weights are 0."""
    scores = tl.zeros((N, N), tl.float32)
    for first in tl.static_range(0, dk, D):
        query = _tile(q, q_t, first, tokens, dk, N, D)
        key = _tile(k, k_t, first, tokens, dk, N, D)
        scores += tl.dot(query, tl.trans(key), input_precision=PRECISION)
    scores = scores * scale
    if BIAS:
        scores += _pairs(bias, tokens, N)
    if MASK:
        scores += _pairs(mask, tokens, N)
    scores = tl.where((tl.arange(0, N) < tokens)[None, :], scores, float("-inf"))
    top = tl.max(scores, axis=1)
    top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2((scores - top[:, None]) * LOG2E)
    total = tl.sum(weights, axis=1)
    return weights, tl.where(total == 0.0, 1.0, total)


@triton.jit(do_not_specialize=["tokens", "windows", "scale"])
@no_type_check
def _forward(
    q, k, v, bias, mask, out, tokens, windows, scale,
    q_r, q_h, q_t, k_r, k_h, k_t, v_r, v_h, v_t, o_r, o_h, o_t,
    dk: tl.constexpr, dv: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BIAS: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One window of one head."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pairs = tokens * tokens
    weights, total = _weights(
        q + row * q_r + head * q_h, k + row * k_r + head * k_h, bias + head * pairs,
        mask + (row % windows) * pairs, q_t, k_t, tokens, scale, dk, N, D, BIAS, MASK, PRECISION,
    )  # fmt: skip
    weights = weights.to(v.dtype.element_ty)
    for first in tl.static_range(0, dv, D):
        value = _tile(v + row * v_r + head * v_h, v_t, first, tokens, dv, N, D)
        found = tl.dot(weights, value, input_precision=PRECISION) / total[:, None]
        _put(out + row * o_r + head * o_h, found, o_t, first, tokens, dv, N, D)


@triton.jit(do_not_specialize=["rows", "tokens", "windows", "scale"])
@no_type_check
def _backward(
    q, k, v, bias, mask, d_out, d_q, d_k, d_v, d_bias, rows, tokens, windows, scale,
    q_r, q_h, q_t, k_r, k_h, k_t, v_r, v_h, v_t, o_r, o_h, o_t,
    dq_r, dq_h, dq_t, dk_r, dk_h, dk_t, dv_r, dv_h, dv_t,
    dk: tl.constexpr, dv: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BIAS: tl.constexpr,
    MASK: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every so many-th window of one head; with SUMS the sum of their dS too."""
    head, pairs = tl.program_id(1), tokens * tokens
    summed = tl.zeros((N, N), tl.float32)
    for place in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(place, tl.int64)
        q_at, k_at = q + row * q_r + head * q_h, k + row * k_r + head * k_h
        v_at, o_at = v + row * v_r + head * v_h, d_out + row * o_r + head * o_h
        weights, total = _weights(
            q_at, k_at, bias + head * pairs, mask + (row % windows) * pairs, q_t, k_t, tokens, scale,
            dk, N, D, BIAS, MASK, PRECISION,
        )  # fmt: skip
        weights = weights / total[:, None]
        narrow = tl.trans(weights.to(v.dtype.element_ty))
        d_weights = tl.zeros((N, N), tl.float32)
        for first in tl.static_range(0, dv, D):
            grad = _tile(o_at, o_t, first, tokens, dv, N, D)
            value = _tile(v_at, v_t, first, tokens, dv, N, D)
            d_weights += tl.dot(grad, tl.trans(value), input_precision=PRECISION)
            found = tl.dot(narrow, grad, input_precision=PRECISION)
            _put(d_v + row * dv_r + head * dv_h, found, dv_t, first, tokens, dv, N, D)
        mean = tl.sum(weights * d_weights, axis=1)
        d_scores = weights * (d_weights - mean[:, None])
        if SUMS:
            summed += d_scores
        d_narrow = d_scores.to(q.dtype.element_ty)
        for first in tl.static_range(0, dk, D):
            key = _tile(k_at, k_t, first, tokens, dk, N, D)
            found = tl.dot(d_narrow, key, input_precision=PRECISION) * scale
            _put(d_q + row * dq_r + head * dq_h, found, dq_t, first, tokens, dk, N, D)
            query = _tile(q_at, q_t, first, tokens, dk, N, D)
            found = tl.dot(tl.trans(d_narrow), query, input_precision=PRECISION) * scale
            _put(d_k + row * dk_r + head * dk_h, found, dk_t, first, tokens, dk, N, D)
    if SUMS:
        t, s = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
        at = d_bias + (tl.program_id(0) * tl.num_programs(1) + head).to(tl.int64) * pairs
        tl.store(at + t * tokens + s, summed, mask=(t < tokens) & (s < tokens))
