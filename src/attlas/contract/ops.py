"""The checks of ops: functions of q, k, v that give (out, lse) as the definition does."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from attlas import masks, ops
from attlas.contract.measure import (
    Measure,
    Subject,
    check,
    distance,
    finite,
    holds,
    refuses,
    same,
)
from attlas.positions import ALiBi


def is_attention(subject: Subject) -> bool:
    """Whether the op is exact attention: q, k, v, a mask and a change of scores."""
    taken = inspect.signature(subject.object).parameters
    return {"q", "k", "v", "mask", "score_mod"} <= set(taken)


def qkv(
    queries: int = 13, keys: int = 37, heads: int = 4, kv: int = 2, **kind: Any
) -> list[Tensor]:
    """Queries, keys and values of grouped heads, wider in the values, in float64."""
    torch.manual_seed(0)
    kind = {"dtype": torch.float64, **kind}
    sizes = ((2, heads, queries, 8), (2, kv, keys, 8), (2, kv, keys, 6))
    return [torch.randn(size, **kind) for size in sizes]


def _masks(queries: int, keys: int) -> dict[str, Any]:
    torch.manual_seed(1)
    valid = torch.ones(2, keys, dtype=torch.bool)
    valid[0, keys // 2 :] = False
    return {
        "all": None,
        "causal": masks.causal,
        "window": masks.causal & (masks.window(5) | masks.sinks(2)),
        "padding": masks.padding(valid),
        "dense": torch.rand(2, 4, queries, keys) > 0.3,
        "one row blind": torch.arange(queries)[:, None].ne(2).expand(1, 1, queries, keys),
    }


def _truth(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    return ops.reference(
        q, k, v, scale=q.shape[-1] ** -0.5, q_offset=k.shape[2] - q.shape[2], **given
    )


@check("op", when=is_attention)
def defined(subject: Subject) -> Iterator[Measure]:
    """Output, lse and gradients are those of the definition, for every mask, head and chunk size."""
    chunks: list[dict[str, int]] = [{}]
    if "q_chunk" in inspect.signature(subject.object).parameters:
        chunks += [{"q_chunk": 5, "k_chunk": 7}]
    for (name, mask), options in product(_masks(13, 37).items(), chunks):
        for case, score_mod in {name: None, f"{name} alibi": ALiBi(4).double().score_mod}.items():
            ours, theirs = qkv(), qkv()
            for tensor in ours + theirs:
                tensor.requires_grad_()
            found = subject.object(*ours, mask=mask, score_mod=score_mod, **options)
            wanted = _truth(*theirs, mask=mask, score_mod=score_mod)
            case = f"{case} {options}"
            yield same(f"{case} out", found[0], wanted[0])
            yield same(f"{case} lse", found[1].exp(), wanted[1].exp())
            for out in (found, wanted):
                (out[0].square().sum() + out[1].exp().sum()).backward()
            for which, a, b in zip("qkv", ours, theirs, strict=True):
                assert a.grad is not None
                assert b.grad is not None
                yield same(f"{case} d{which}", a.grad, b.grad)


@check("op", when=is_attention)
def twice_the_plain_error(subject: Subject) -> Iterator[Measure]:
    """Against float64, the error is at most twice that of the plain computation, and an ulp."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = qkv(queries=65, keys=65, dtype=dtype)
        truth = _truth(q.double(), k.double(), v.double(), mask=masks.causal)[0]
        fast = subject.object(q, k, v, mask=masks.causal)[0]
        plain = _truth(q, k, v, mask=masks.causal)[0]
        ulp = torch.finfo(dtype).eps * float(truth.abs().max())
        yield Measure(str(dtype), distance(fast, truth), 2 * distance(plain, truth) + ulp)
        yield holds(f"{dtype} stays", fast.dtype == dtype, f"gives {fast.dtype}")


@check("op", when=is_attention)
def finite_differences(subject: Subject) -> Iterator[Measure]:
    """Gradients through out and lse agree with finite differences in float64."""
    inputs = [t.requires_grad_() for t in qkv(queries=3, keys=4)]
    agree = torch.autograd.gradcheck(
        lambda q, k, v: subject.object(q, k, v, mask=masks.causal), inputs, fast_mode=True,
        raise_exception=False,
    )  # fmt: skip
    yield holds("causal", bool(agree), "gradients do not agree with finite differences")


@check("op", when=is_attention)
def extreme_inputs(subject: Subject) -> Iterator[Measure]:
    """Logits of ±1e4 and rows that see nothing: no NaN, no Inf, forward and backward."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (t.requires_grad_() for t in qkv(dtype=dtype))
        blind = torch.ones(1, 1, 13, 37, dtype=torch.bool)
        blind[..., 4, :] = False
        out, _ = subject.object(q * 2e3, k * 2, v, mask=blind)
        out.float().sum().backward()
        yield finite(str(dtype), out, q.grad, k.grad, v.grad)
        yield Measure(f"{dtype} blind row", float(out[:, :, 4].detach().abs().max()), 0.0)


@check("op", when=is_attention)
def twice_differentiable(subject: Subject) -> Iterator[Measure]:
    """Gradients of gradients agree with finite differences in float64."""
    inputs = [t.requires_grad_() for t in qkv(queries=3, keys=4)]
    agree = torch.autograd.gradgradcheck(
        lambda q, k, v: subject.object(q, k, v, mask=masks.causal), inputs, fast_mode=True,
        raise_exception=False,
    )  # fmt: skip
    yield holds("causal", bool(agree), "second derivatives do not agree with finite differences")


@check("op", when=is_attention)
def nothing(subject: Subject) -> Iterator[Measure]:
    """No keys give 0 and lse −∞, no sequences nothing; a scale of 0 gives the mean of the values."""
    q, k, v = (t.requires_grad_() for t in qkv())
    out, lse = subject.object(q, k[:, :, :0], v[:, :, :0])
    yield same("no keys out", out, q.new_zeros(*q.shape[:3], v.shape[3]))
    yield holds("no keys lse", bool((lse == -torch.inf).all()), "lse is not −∞")
    out, lse = subject.object(q[:0], k[:0], v[:0])
    out.sum().backward()
    yield holds("no sequences", out.shape[0] == lse.shape[0] == 0, f"gives {list(out.shape)}")
    out, _ = subject.object(q, k, v, scale=0.0)
    mean = v.mean(2, keepdim=True).repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    yield same("scale 0", out, mean.expand_as(out))


@check("op", when=is_attention)
def strides(subject: Subject) -> Iterator[Measure]:
    """Inputs that are not contiguous give what contiguous ones give."""
    q, k, v = qkv()
    views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    yield same("tokens before heads", subject.object(*views)[0], subject.object(q, k, v)[0])


@check("op", when=is_attention)
def merged(subject: Subject) -> Iterator[Measure]:
    """Attention to two halves of the keys merges into attention to all of them."""
    q, k, v = qkv()
    parts = [subject.object(q, a, b) for a, b in
             zip(k.split([20, 17], 2), v.split([20, 17], 2), strict=True)]  # fmt: skip
    out, lse = ops.merge(parts)
    whole = subject.object(q, k, v)
    yield same("out", out, whole[0])
    yield same("lse", lse, whole[1])


@check("op", when=lambda s: is_attention(s) and "q_chunk" in inspect.signature(s.object).parameters)
def wrong_arguments(subject: Subject) -> Iterator[Measure]:
    """Chunks of nothing are a ValueError that names the argument."""
    q, k, v = qkv()
    yield refuses("q_chunk=0", lambda: subject.object(q, k, v, q_chunk=0), "q_chunk")
    yield refuses("k_chunk=0", lambda: subject.object(q, k, v, k_chunk=0), "k_chunk")


@check("op")
def described(subject: Subject) -> Iterator[Measure]:
    """The function and its module say what is computed."""
    yield holds("docstring", bool(inspect.getdoc(subject.object)), "no docstring")
