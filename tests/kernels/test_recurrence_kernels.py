"""The kernel of recurrences, run by Triton's interpreter where there is no GPU, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
from interpreted import MARKS, answer, verdicts
from torch import Tensor

from attlas import ops

pytestmark = MARKS

DECAYS = ("none", "head", "token", "channel")
#: Of each update, the decays that its kernels take; "both ways" is the additive one without `causal`.
UPDATES = {
    "": DECAYS, "delta ": DECAYS[:3], "low rank ": ("none", "channel"), "both ways ": DECAYS[1:],
}  # fmt: skip
#: What a case is when it says nothing else; so many multiprocessors cut a sequence into stretches.
PLAIN: dict[str, Any] = {
    "batch": 1, "heads": 1, "tokens": 130, "dim": 16, "width": 24, "decay": "none", "offsets": None,
    "state": True, "wild": False, "units": 4, "dtype": "float32", "update": "",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    f"{update}{decay}, {name}": {"decay": decay, "update": update.strip(), **case}
    for update, decays in UPDATES.items()
    for decay in decays
    for name, case in {
        "one token": {"tokens": 1},
        "one stretch": {"units": 1, "tokens": 65},
        "several stretches": {"tokens": 300 if decay == "channel" else 1100 - 800 * bool(update),
                              "units": 12},
        "a batch, no state": {"batch": 2, "heads": 2, "dim": 32, "width": 16, "state": False},
        "widths between powers of two": {"dim": 20, "width": 72},
        "packed": {"offsets": (0, 70, 70, 71, 200), "tokens": 200},
        "packed, several stretches": {"offsets": (0, 170, 400), "tokens": 400, "units": 40},
        "extreme": {"wild": True, "tokens": 200},
    }.items()
    if name != "extreme" or update or decay != "none"
    if not update.startswith("both") or name in ("one stretch", "packed, several stretches", "extreme")
}  # fmt: skip
for name, case in CASES.items():  # from which nothing leads to states
    case["state"] = case.get("state", True) and not name.startswith("both ways")
#: Decays of heads whose gradients, of inputs in half precision, are as exact as those of float32.
HALVES: dict[str, dict[str, Any]] = {
    f"halves, {name}": {"decay": "head", "heads": 2, "dim": 32, "dtype": "float16", **case}
    for name, case in {
        "one stretch": {"units": 1, "tokens": 200},
        "several stretches": {"units": 12, "tokens": 1100},
        "packed": {"offsets": (0, 170, 170, 400), "tokens": 400, "units": 40},
        "extreme": {"wild": True},
    }.items()
}  # fmt: skip
#: On a GPU alone.
LARGE: dict[str, dict[str, Any]] = {
    f"{update}{decay}, {tokens} of {dim} in bfloat16": {
        "decay": decay, "tokens": tokens, "dim": dim, "width": dim, "dtype": "bfloat16", "wild": wild,
        "heads": 3, "update": update.strip(), "state": update != "both ways ",
    }
    for update, decays in UPDATES.items()
    for decay in decays
    for tokens, dim, wild in ((1000, 128, False), (2111, 64, False), (500, 128, decay != "none"))
}  # fmt: skip


def inputs(device: str, case: dict[str, Any]) -> tuple[dict[str, Tensor | None], list[Tensor]]:
    """What the kernel takes, amid numbers that are none, and gradients of its outputs."""
    torch.manual_seed(0)
    batch, heads, tokens, dim, width = (case[n] for n in ("batch", "heads", "tokens", "dim", "width"))
    dtype = getattr(torch, case["dtype"])

    def poisoned(*shape: int) -> Tensor:
        """[batch, heads, tokens, …], of whose heads every second is none of ours."""
        whole = torch.full((batch, tokens + 2, 2 * heads, *shape), torch.nan)
        inner = whole[:, 1:-1, ::2]
        inner.copy_(torch.randn(inner.shape) * 0.3)
        return inner.transpose(1, 2)

    q, k, v = (poisoned(n) for n in (dim, dim, width))
    beta = poisoned() if case["update"] == "delta" else None
    if beta is not None:  # keys of length 1, and strengths below it, so that nothing grows
        beta.copy_(beta.sigmoid())
        if case["wild"]:  # most keys alike, and some values taken over whole or not at all
            k.copy_(k[:, :, :1] + 0.3 * k)
            beta.copy_((3 * (beta - 0.4)).clamp(0, 1))
        k.copy_(k / k.norm(dim=-1, keepdim=True))
    decays = {"head": torch.randn(heads), "token": poisoned(), "channel": poisoned(dim)}
    g = decays.get(case["decay"])
    if g is not None:
        g.copy_(-g.abs())
        if case["wild"]:
            pick = torch.rand(g.shape)
            for share, decay in ((0.5, 0.0), (0.1, -69.1), (0.05, -torch.inf)):
                g.masked_fill_(pick < share, decay)
    sequences = batch if case["offsets"] is None else len(case["offsets"]) - 1
    start = torch.randn(sequences, heads, dim, width) if case["state"] else None
    given = {n: _onto(device, dtype, x) for n, x in zip("qkv", (q, k, v), strict=True)}
    given |= {n: None if x is None else x.to(device) for n, x in (("g", g), ("start", start))}
    if beta is not None:
        given["beta"] = _onto(device, dtype, beta)
    if case["update"] == "low rank":  # a share of what stands under b is taken away, as in RWKV-7
        a, b = poisoned(dim), poisoned(dim)
        b.copy_(b / b.norm(dim=-1, keepdim=True))
        a.copy_(-b * torch.rand(b.shape))
        if case["wild"]:
            a.masked_fill_(torch.rand(a.shape[:3])[..., None] < 0.5, 0.0)
        given |= {"a": _onto(device, dtype, a), "b": _onto(device, dtype, b)}
    grads = [torch.randn(batch, heads, tokens, width).to(device, dtype),
             torch.randn(sequences, heads, dim, width).to(device)]  # fmt: skip
    return given, grads


def _onto(device: str, dtype: torch.dtype, x: Tensor) -> Tensor:
    base = x._base
    assert base is not None
    moved = base.to(device, dtype)
    return moved.as_strided(x.shape, x.stride(), x.storage_offset())


def results(
    run: Any, given: dict[str, Tensor | None], grads: list[Tensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Outputs, the state and all gradients of one way to compute."""
    leaves = {n: None if x is None else x.detach().to(dtype or x.dtype).requires_grad_()
              for n, x in given.items()}  # fmt: skip
    out, end = run(**leaves)
    loss = (out.double() * grads[0].double()).sum()
    if given["start"] is not None and end is not None:
        loss = loss + (end.double() * grads[1].double()).sum()
    loss.backward()
    found = {"out": out, "end": end}
    return {n: x.detach().double() for n, x in found.items() if x is not None} | {
        f"d{n}": x.grad.double() for n, x in leaves.items() if x is not None and x.grad is not None
    }


def coarse(offsets: tuple[int, ...] | None, both: bool) -> Any:
    """All pairs by plain operations in the type of the inputs."""

    def one(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        whole = g.float().clamp(min=-69.0).cumsum(2)
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()[..., None]
        apart = (whole[:, :, :, None] - whole[:, :, None]).masked_fill(~seen, -torch.inf).exp()
        apart = apart.to(q.dtype).expand(*apart.shape[:4], q.shape[-1])
        pairs = torch.einsum("bhtd,bhsd,bhtsd->bhts", q, k, apart)
        out = 0.5 * pairs @ v
        end = ((k * (whole[:, :, -1:] - whole).exp().to(k.dtype)).mT @ v).float()
        if start is not None:
            out = out + 0.5 * (q * whole.exp().to(q.dtype)) @ start.to(q.dtype)
            end = end + whole[:, :, -1].exp()[..., None] * start
        return out, end

    def both_ways(q: Tensor, k: Tensor, v: Tensor, g: Tensor, start: None) -> tuple[Tensor, None]:
        """The token itself once."""
        back, _ = one(*(x.flip(2) for x in (q, k, v, g)), start)
        ahead, _ = one(q, k, v, g, start)
        return ahead + back.flip(2) - 0.5 * (q * k).sum(-1, keepdim=True) * v, None

    def by_token(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor, start: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Token by token, the state rounded wherever it is read."""
        state = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]).float()
        state, found = state if start is None else start, []
        for query, key, value, rate, left, right in zip(
            *(x.unbind(2) for x in (q, k, v, g, a, b)), strict=True
        ):
            there = torch.einsum("bhdv,bhd->bhv", state.to(key.dtype), right)
            state = rate.float().exp()[..., None] * state
            for x, y in ((key, value), (left, there)):
                state = state + x.float()[..., None] * y.float()[..., None, :]
            found.append(0.5 * torch.einsum("bhdv,bhd->bhv", state.to(key.dtype), query))
        return torch.stack(found, dim=2), state

    def run(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor | None,
        beta: Tensor | None = None, a: Tensor | None = None, b: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        g = torch.zeros(q.shape[1], device=q.device) if g is None else g
        g = g[None, :, None, None] if g.ndim == 1 else g if g.ndim == 4 else g[..., None]
        g = g.expand(*q.shape[:3], -1)
        if beta is not None:
            a, b = -beta[..., None] * k, g.exp().to(k.dtype) * k
            k = beta[..., None] * k
        parts = []
        for n, (begin, stop) in enumerate(pairwise(offsets or (0, q.shape[2]))):
            rows = slice(n, n + 1) if offsets else slice(None)
            state = start[rows] if start is not None else None
            if begin == stop:
                empty = q.new_zeros(1, *k.shape[1:2], k.shape[-1], v.shape[-1])
                parts.append((v[:, :, begin:stop], empty if state is None else state))
            else:
                cut = [x[:, :, begin:stop] for x in (q, k, v, g, a, b) if x is not None]
                way = both_ways if both else one if a is None else by_token
                parts.append(way(*cut, state))
        out = torch.cat([o for o, _ in parts], dim=2)
        return out, None if both else torch.cat([e for _, e in parts])

    return run


def errors(name: str, device: str = "cpu") -> dict[str, tuple[float, float]]:
    """Of every result against float64, and what is allowed: twice that of plain operations, and a bit."""
    from attlas.kernels.delta_run import Delta
    from attlas.kernels.low_rank_run import LowRank
    from attlas.kernels.recurrence import Behind, Scan
    from attlas.ops.recurrence_kernels import _late

    if name in HALVES:
        return errors_of_halves({**PLAIN, **HALVES[name]}, device)
    case = {**PLAIN, **{**CASES, **LARGE}[name]}
    if device == "cuda":  # whose float32 products are coarser than plain ones, and not taken
        case["dtype"] = "bfloat16"
    given, grads = inputs(device, case)
    offsets, both = case["offsets"], case["update"] == "both ways"

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor | None,
        beta: Tensor | None = None, a: Tensor | None = None, b: Tensor | None = None,
    ) -> Any:  # fmt: skip
        shape = (0.5, offsets or (0, q.shape[2]), offsets is not None)
        if a is not None:
            return LowRank.apply(q, k, v, g, a, b, start, *shape)
        if beta is not None:
            return Delta.apply(q, k, v, g, beta, start, *shape)
        out, end = Scan.apply(q, k, v, g, start, *shape)
        if not both:
            return out, end
        assert g is not None
        return out + Behind.apply(q, k, v, _late(g, list(pairwise(shape[1]))), *shape), None

    def exact(
        q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, start: Tensor | None,
        beta: Tensor | None = None, a: Tensor | None = None, b: Tensor | None = None,
    ) -> Any:  # fmt: skip
        packed = None if offsets is None else torch.tensor(offsets)
        return ops.recurrence(
            q, k, v, log_decay=g, beta=beta, low_rank=None if a is None or b is None else (a, b),
            initial_state=start, scale=0.5, cu_seqlens=packed, form="chunked", causal=not both,
        )  # fmt: skip

    with cut_for(case["units"]):
        ours = results(kernel, given, grads)
    true = results(exact, given, grads, torch.float64)
    plain = results(coarse(offsets, both), given, grads)
    # A channel that forgets by more than e^−8.3 a token is taken to forget by that.
    # In a chunk's system of equations, the rounding of its sums of decays adds up.
    bit = 5e-4 if case["wild"] and case["decay"] == "channel" else 5e-5 if case["update"] else 5e-6
    factor = 10
    if device == "cuda":  # and an ulp, as contracts allow it
        bit, factor = max(bit, torch.finfo(torch.bfloat16).eps), 2
    found = {}
    for part, x in true.items():
        size = x.abs().max().item()
        off, theirs = ((y[part] - x).abs().max().item() for y in (ours, plain))
        # Decays' gradients are differences of sums over all tokens.
        found[part] = (off, 2 * theirs + (factor * bit if part == "dg" else bit) * size)
    return found


def errors_of_halves(case: dict[str, Any], device: str) -> dict[str, tuple[float, float]]:
    """The same of gradients of decays of heads alone, against plain operations in float32."""
    from attlas.kernels.head_decay import gradient_of_heads

    if device == "cuda":
        case["dtype"] = "bfloat16"
    given, (d_out, d_end) = inputs(device, case)
    offsets = case["offsets"]
    q, k, v, g, start = (given[n] for n in ("q", "k", "v", "g", "start"))
    rest: dict[str, Any] = {"offsets": offsets or (0, case["tokens"]), "packed": offsets is not None}
    with cut_for(case["units"]):
        ours = gradient_of_heads(q, k, v, d_out, g, scale=0.5, start=start, d_end=d_end, **rest)

    def plain(dtype: torch.dtype) -> Tensor:
        rate = g.detach().to(dtype).requires_grad_()
        out, end = ops.recurrence(
            q.to(dtype), k.to(dtype), v.to(dtype), log_decay=rate, initial_state=start.to(dtype),
            scale=0.5, cu_seqlens=None if offsets is None else torch.tensor(offsets), form="chunked",
        )  # fmt: skip
        loss = (out * d_out.to(dtype)).sum() + (end * d_end.to(dtype)).sum()
        return torch.autograd.grad(loss, rate)[0].double()

    true = plain(torch.float64)
    off, theirs = ((x - true).abs().max().item() for x in (ours, plain(torch.float32)))
    return {"dg": (off, 2 * theirs + 2e-6 * true.abs().max().item())}


@contextmanager
def cut_for(units: int) -> Iterator[None]:
    """As many stretches as for a device of so many multiprocessors."""
    from attlas.kernels import channels_run, delta_run, head_decay, low_rank_run, sweep_run

    with ExitStack() as stack:
        for module in (channels_run, delta_run, head_decay, low_rank_run, sweep_run):
            stack.enter_context(patch.object(module, "units", lambda _: units))
        yield


@pytest.fixture(scope="module")
def judged() -> Iterator[Callable[[str], Any]]:
    with verdicts(__file__, errors) as told:
        yield told


@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_the_kernel_is_as_exact_as_plain_operations(name: str, judged: Any) -> None:
    wrong = {part: pair for part, pair in judged(name).items() if not pair[0] <= pair[1]}
    assert not wrong
    assert {"out", "dq", "dk", "dv"} <= set(judged(name))
    assert ("end" in judged(name)) != name.startswith("both ways")


@pytest.mark.parametrize("name", HALVES)
def test_gradients_of_decays_of_heads_are_as_exact_as_in_float32(name: str, judged: Any) -> None:
    off, allowed = judged(name)["dg"]
    assert off <= allowed


if __name__ == "__main__":
    answer(errors, {**CASES, **HALVES})
