"""What is timed: groups of cells, each one operation at one size with all that could do it.

| group | what | beside |
|---|---|---|
| `machine` | a copy, a product of matrices | |
| `attention` | a causal prompt, forward, and with its backward | SDPA by every route, flash-attn |
| `window` | a sliding window over a prompt | SDPA with the window as a mask |
| `decode` | one token over a cache: dense, in 4 and 2 bits, an eighth of its pages | SDPA, FlashInfer |
| `recurrence` | a chunked recurrence by kind of decay, forward, and with its backward | fla; SDPA |

A cell's first candidate decides what is right: `difference` is how far another one's numbers are from
its, over its largest. Bytes and operations are those that any program must move and do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from attlas import masks, ops
from attlas.bench import rivals
from attlas.bench.rivals import Run
from attlas.bench.steps import SHARE, Step, pages, still
from attlas.ops.decode import decode
from attlas.ops.quantize import encode
from attlas.ops.segments import Coded, Dense
from attlas.tasks.roof import copying, multiplying

#: Kinds of decay, as `ops.recurrence` has them.
KINDS = ("none", "head", "token", "channel", "delta", "gated delta", "low rank")
#: Tokens of a page.
PAGE = 32


@dataclass(frozen=True)
class Sizes:
    """What cells are measured at on a kind of device."""

    heads: int
    kv_heads: int
    width: int
    prompts: tuple[int, ...]
    caches: tuple[tuple[int, int], ...]  # (batch, keys)
    recurrences: tuple[int, ...]
    window: int


CPU = Sizes(8, 4, 64, (512, 2048), ((1, 8192), (1, 32768)), (2048,), 256)
CUDA = Sizes(32, 8, 128, (1024, 4096, 16384), ((1, 8192), (1, 32768), (1, 131072), (8, 32768)),
             (4096, 16384), 1024)  # fmt: skip


@dataclass
class Made:
    """A cell with its numbers in memory.

    Attributes:
        runs: candidates by name.
        nbytes: bytes that each must read and write at least.
        flops: operations that each must do at least.
        exact: candidates that compute the very same as the first.
    """

    runs: dict[str, Run]
    nbytes: Mapping[str, float]
    flops: float
    exact: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Cell:
    """One operation at one size."""

    group: str
    name: str
    make: Callable[[], Made]


def cells(device: torch.device, dtype: torch.dtype) -> Iterator[Cell]:
    """All cells of a device, the machine's own first."""
    sizes = CUDA if device.type == "cuda" else CPU
    random = partial(_random, device=device, dtype=dtype)
    yield Cell("machine", "copy", lambda: _copy(device))
    yield Cell("machine", "product", lambda: _product(device, dtype))
    for tokens in sizes.prompts:
        for trained in (False, True):
            name = f"{tokens} tokens{', with backward' if trained else ''}"
            yield Cell("attention", name, partial(_prompt, sizes, tokens, trained, random))
    longest = sizes.prompts[-1]
    name = f"{sizes.window} of {longest} tokens"
    yield Cell("window", name, partial(_window, sizes, longest, random))
    for batch, keys in sizes.caches:
        yield Cell("decode", f"batch {batch}, {keys} keys", partial(_decode, sizes, batch, keys, random))
    for kind in KINDS:
        for tokens in sizes.recurrences:
            for trained in (False, True):
                name = f"decay {kind}, {tokens} tokens{', with backward' if trained else ''}"
                make = partial(_recurrence, sizes, kind, tokens, trained, random)
                yield Cell("recurrence", name, make)


def _random(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def _copy(device: torch.device) -> Made:
    run, nbytes = copying(device)
    return Made({"copy": run}, {"copy": nbytes}, 0.0)


def _product(device: torch.device, dtype: torch.dtype) -> Made:
    run, flops = multiplying(device, dtype)
    return Made({"product": run}, {"product": 0.0}, flops)


def _prompt(sizes: Sizes, tokens: int, trained: bool, random: Callable[..., Tensor]) -> Made:
    q, k, v = leaves = _qkv(sizes, 1, tokens, tokens, random)
    _trained(leaves, trained)
    runs: dict[str, Run] = {"attlas": lambda: ops.attend(q, k, v, mask=masks.causal)}
    runs |= rivals.sdpa(q, k, v, causal=True)
    if other := rivals.flash_attention(q, k, v, causal=True):
        runs["flash-attn"] = other
    flops = 2.0 * sizes.heads * tokens**2 * sizes.width  # half of the pairs, two products
    moved = 2.0 * (q.nbytes + k.nbytes)
    if trained:
        runs, moved, flops = _with_backward(runs, leaves), 2 * moved, 3.5 * flops
    return Made(runs, dict.fromkeys(runs, moved), flops, frozenset(runs))


def _window(sizes: Sizes, tokens: int, random: Callable[..., Tensor]) -> Made:
    q, k, v = _qkv(sizes, 1, tokens, tokens, random)
    pattern = masks.causal & masks.window(sizes.window)
    dense = masks.dense(pattern, tokens, tokens, device=q.device)
    runs: dict[str, Run] = {
        "attlas": lambda: ops.attend(q, k, v, mask=pattern),
        "SDPA, dense mask": lambda: scaled_dot_product_attention(
            q, k, v, attn_mask=dense, enable_gqa=True
        ),
    }
    flops = 4.0 * sizes.heads * tokens * sizes.window * sizes.width
    return Made(runs, dict.fromkeys(runs, 2.0 * (q.nbytes + k.nbytes)), flops, frozenset(runs))


def _decode(sizes: Sizes, batch: int, keys: int, random: Callable[..., Tensor]) -> Made:
    """One query: over all keys, over codes of them, and over an eighth of their pages."""
    q, k, v = _qkv(sizes, batch, 1, keys, random)
    steps = {"attlas": still(Dense(k, v))}
    for bits in (4, 2):
        steps[f"attlas, {bits} bits"] = still(Coded(encode(k, bits), encode(v, bits)))
    steps[f"attlas, 1/{SHARE} of pages"] = pages(k, v, PAGE)
    runs: dict[str, Run] = {name: partial(_decoded, q, step) for name, step in steps.items()}
    others: dict[str, Run] = dict(rivals.sdpa(q, k, v, causal=False))
    if other := rivals.flashinfer_decode(q, k, v):
        others["FlashInfer"] = other
    nbytes = {name: step.nbytes for name, step in steps.items()}
    nbytes |= dict.fromkeys(others, steps["attlas"].nbytes)
    flops = 4.0 * batch * sizes.heads * keys * sizes.width
    return Made(runs | others, nbytes, flops, frozenset({"attlas", *others}))


def _decoded(q: Tensor, step: Step) -> Tensor:
    return decode(q, step.segments(q))[0]


def _recurrence(
    sizes: Sizes, kind: str, tokens: int, trained: bool, random: Callable[..., Tensor]
) -> Made:
    heads, width = sizes.heads // 2, sizes.width
    call = recurrent_call(kind, 1, heads, tokens, width, random)
    q, k, v = leaves = tuple(call[name] for name in ("q", "k", "v"))
    _trained(leaves, trained)
    runs: dict[str, Run] = {"attlas": lambda: ops.recurrence(**call, scale=width**-0.5)[0]}
    exact = {"attlas"}
    if other := rivals.linear_attention(kind, call):
        runs["fla"] = other
        exact.add("fla")
    runs["SDPA, causal"] = lambda: scaled_dot_product_attention(q, k, v, is_causal=True)
    rows = heads * tokens
    flops = 2.0 * rows * width * (2 * 64 + 2 * width)  # chunks of 64 and their states
    nbytes = dict.fromkeys(runs, 4.0 * q.nbytes)
    if trained:
        runs = _with_backward(runs, leaves)
        nbytes, flops = dict.fromkeys(runs, 12.0 * q.nbytes), 3 * flops
    return Made(runs, nbytes, flops, frozenset(exact))


def recurrent_call(
    kind: str, batch: int, heads: int, tokens: int, width: int, random: Callable[..., Tensor]
) -> dict[str, Any]:
    """Arguments of `ops.recurrence`, as views [batch, heads, tokens, …] of token-first tensors."""

    def first(*shape: int) -> Tensor:
        return random(batch, tokens, heads, *shape).transpose(1, 2)

    k = normalize(first(width), dim=-1)
    call: dict[str, Any] = {"q": 0.1 * first(width), "k": k, "v": 0.1 * first(width)}
    if kind == "head":
        call["log_decay"] = -torch.linspace(0.001, 0.1, heads, device=k.device)
    if kind in ("token", "gated delta"):
        call["log_decay"] = -0.1 * first().float().sigmoid()
    if kind in ("channel", "low rank"):
        call["log_decay"] = -0.1 * first(width).float().sigmoid()
    if "delta" in kind:
        call["beta"] = first().sigmoid()
    if kind == "low rank":
        call["low_rank"] = (-k, k * first(width).sigmoid())
    return call


def _qkv(
    sizes: Sizes, batch: int, queries: int, keys: int, random: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    q = random(batch, sizes.heads, queries, sizes.width)
    k, v = (random(batch, sizes.kv_heads, keys, sizes.width) for _ in range(2))
    return q, k, v


def _trained(leaves: tuple[Tensor, ...], trained: bool) -> None:
    """Gradients are wanted of these; before anyone looks at them through a view, which has none else."""
    for leaf in leaves:
        leaf.requires_grad_(trained)


def _with_backward(runs: dict[str, Run], leaves: tuple[Tensor, ...]) -> dict[str, Run]:
    """Each run with the gradients of `leaves`, which come behind its result."""

    def whole(run: Run) -> tuple[Tensor, ...]:
        out = run()
        assert isinstance(out, Tensor)
        found = torch.autograd.grad(out, leaves, torch.ones_like(out))
        return out.detach(), *found

    return {name: partial(whole, run) for name, run in runs.items()}
