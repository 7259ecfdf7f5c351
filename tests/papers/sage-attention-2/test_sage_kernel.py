"""The kernels that make integers and go over them, by Triton's interpreter where there is no GPU: codes
against the plain ones, attention against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from math import e, log2
from typing import Any
from unittest.mock import patch

import pytest
import torch
from interpreted import MARKS, answer, verdicts

from attlas import masks, ops
from attlas.ops import sage_attention as op

pytestmark = MARKS

#: What a case is when it says nothing else.
PLAIN: dict[str, Any] = {
    "batch": 1, "heads": 2, "kv": 1, "queries": 70, "keys": 150, "dim": 64, "dtype": "float16",
    "mask": None, "values": "fp8", "bits": 8, "options": {},
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "all pairs": {},
    "causal": {"mask": masks.causal},
    "causal, blocks whole": {"mask": masks.causal, "queries": 128, "keys": 128},
    "causal, more queries than keys": {"mask": masks.causal, "queries": 150, "keys": 70},
    "causal, several blocks": {"mask": masks.causal, "queries": 260, "keys": 390},
    "one query": {"mask": masks.causal, "queries": 1},
    "one key": {"keys": 1},
    "batch and groups": {"batch": 2, "heads": 6, "kv": 2, "mask": masks.causal},
    "heads of 128": {"dim": 128, "mask": masks.causal},
    "values of 16 bits": {"values": "fp16", "mask": masks.causal},
    "heads of 128, values of 16 bits": {"values": "fp16", "dim": 128},
    "4 bits": {"bits": 4, "options": {"smooth_q": False}},
    "scales of blocks": {"options": {"per": "block"}, "mask": masks.causal},
    "nothing smoothed": {"options": {"smooth_k": False, "smooth_v": False}},
    "bfloat16": {"dtype": "bfloat16", "mask": masks.causal},
}


def errors(name: str, device: str = "cpu") -> list[tuple[float, float]]:
    """Of the kernel's outputs and sums against float64, and what is allowed: twice the plain form's."""
    case = {**PLAIN, **CASES[name]}
    torch.manual_seed(0)
    sizes = [(case["heads"], case["queries"]), (case["kv"], case["keys"]), (case["kv"], case["keys"])]
    q, k, v = (torch.randn(case["batch"], n, tokens, case["dim"]) for n, tokens in sizes)
    k, v = k + 3 * torch.randn(1, case["kv"], 1, case["dim"]), v + 1
    given = [t.to(device, getattr(torch, case["dtype"])) for t in (q, k, v)]
    options = {"bits": case["bits"], "values": case["values"], "k_block": 128, **case["options"]}
    taken = patch.object(op, "refuses", lambda *_: None) if device == "cpu" else nullcontext()
    with taken, patch.object(torch.cuda, "device_of", lambda _: nullcontext()):
        found = op.sage_attention(*given, mask=case["mask"], route="kernel", **options)
    plain = op.sage_attention(*given, mask=case["mask"], route="reference", **options)
    exact = ops.attend(
        *(t.double() for t in given), mask=case["mask"], return_lse=True, route="reference"
    )
    return [_error(*three) for three in zip(found, plain, exact, strict=True)]


def strays(name: str, device: str = "cpu") -> dict[str, float]:
    """Of the codes and scales of the kernels: how far from the plain ones, and the share that is."""
    from attlas.kernels.sage_codes import Bits, coded, ordered

    threads, bits, dim = name == "threads", 8 if name == "threads" else 4, 64
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, t, dim) for n, t in ((4, 70), (2, 300), (2, 300)))
    k, v = k + 3 * torch.randn(1, 2, 1, dim), v + 1
    v[:, :, :, 3] = 2.0
    q, k, v = (t.to(device, torch.float16) for t in (q, k, v))
    runs = (24, 64) if threads else (20, 16)
    made = Bits(op.LARGEST[bits], True, threads, *runs, True, True, op.TINY)
    got = coded(q, k, v, 0.2, log2(e), made)
    mean = k.float().mean(2, keepdim=True)
    per = "thread" if threads else "block"
    ours, theirs = op._integers(q.float(), k.float() - mean, bits, per, 0.2 * log2(e), *runs)
    values, v_scale, v_mean = op._rounded_values(v, "fp8", True)
    place = torch.arange(got.v.shape[3])
    at = ordered.fn(place)
    mine = torch.zeros(got.v.shape)
    mine[..., at] = got.v.float().cpu()
    assert mine[..., 300:].eq(0).all()
    assert got.v_mean is not None
    assert got.common is not None
    factor = 0.2 * log2(e) if threads else 1.0
    many = -(-300 // runs[1])
    plain = theirs.scales.unflatten(2, (many, -1)).expand(-1, -1, -1, 4)
    pairs = {
        "q": (got.q, ours.codes), "k": (got.k, theirs.codes), "v": (mine[..., :300].mT, values),
        "row_scale": (got.row_scale, ours.each * factor), "scales": (got.scales[:, :, :many], plain),
        "v_scale": (got.v_scale, v_scale), "v_mean": (got.v_mean, v_mean),
        "common": (got.common, ops.grouped_product(q.float(), mean.mT)[..., 0] * 0.2),
    }  # fmt: skip
    found = {}
    for what, (a, b) in pairs.items():
        off = (a.double().cpu() - b.double().cpu()).abs()
        found[what] = float(off.max() / b.double().abs().max().cpu())
        found[f"share of {what}"] = float((off > 0).double().mean())
    return found


def _error(found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    assert found.dtype == plain.dtype
    assert found.isneginf().equal(exact.isneginf())
    found, plain, exact = (t.double().nan_to_num(neginf=0.0) for t in (found, plain, exact))
    unit = torch.finfo(torch.bfloat16).eps / 8 * float(exact.abs().max())
    return float((found - exact).abs().max()), 2 * float((plain - exact).abs().max()) + unit


def judge(name: str, device: str = "cpu") -> Any:
    """What is found of a case."""
    if name.startswith("codes of "):
        return strays(name.removeprefix("codes of "), device)
    return errors(name, device)


@pytest.fixture(scope="module")
def judged() -> Iterator[Callable[[str], Any]]:
    with verdicts(__file__, judge) as told:
        yield told


@pytest.mark.parametrize("kind", ["threads", "blocks"])
def test_sage_kernels_make_the_plain_integers(kind: str, judged: Any) -> None:
    """Means are summed in another order, so that a few codes of what they are taken from lie beside."""
    found = judged(f"codes of {kind}")
    assert found["q"] == found["row_scale"] == 0
    # One step of 127 or 7, and of values, of which there are 8 to a power of two.
    assert found["k"] <= (1 / 127 if kind == "threads" else 1 / 7)
    assert found["v"] <= 1 / 8
    assert max(found["share of k"], found["share of v"]) < 2e-3
    assert max(found[x] for x in ("scales", "v_scale", "v_mean", "common")) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_sage_kernel_is_as_exact_as_the_plain_form(name: str, judged: Any) -> None:
    for error, allowed in judged(name):
        assert error <= allowed


@pytest.mark.parametrize("values", ["fp8e4nv", "fp16"])
@pytest.mark.parametrize("dim", [64, 128])
def test_sage_kernel_compiles_for_a_gpu_that_is_not_there(values: str, dim: int) -> None:
    """The interpreter takes what the compiler refuses."""
    from attlas.kernels.sage import Tiles, forward

    cut = Tiles()
    fixed = {
        "DIM": dim, "QUERIES": cut.queries, "KEYS": cut.keys, "RUN": 64, "CAUSAL": True,
        "SMOOTH_V": True, "SMOOTH_K": True, "TMA": True, "ORDER": values != "fp16", "CAREFUL": False,
    }  # fmt: skip
    types = {
        "q": "*i8", "out": "*fp16", "lift": "fp32", "k": f"tensordesc<i8[1, 1, {cut.keys}, {dim}]>",
        "v": f"tensordesc<{values}[1, 1, {dim}, {cut.keys}]>",
    }  # fmt: skip
    names = ("row_scales", "scales", "v_scale", "v_mean", "common", "lse")
    types |= dict.fromkeys(names, "*fp32")
    made = compiled(forward, fixed, types, num_warps=cut.warps, num_stages=cut.stages)
    assert made.metadata.shared <= 227 * 1024
    assert "wgmma" in made.asm["ptx"]
    assert ".s8.s8" in made.asm["ptx"]
    assert (".e4m3.e4m3" in made.asm["ptx"]) == (values != "fp16")
    # Weights go from product to product where they are: threads trade none.
    assert made.asm["ptx"].count("shfl.sync.idx") < 8


def test_sage_kernels_of_codes_compile_for_a_gpu_that_is_not_there() -> None:
    from attlas.kernels.sage_codes import extents, integers, turned

    codes: dict[str, Any] = {"DIM": 128, "SMOOTH": True}
    integral = {**codes, "RUN": 64, "ROOM": 64, "GROUPED": 4, "NEAR": 2, "QUERIES": False}
    factors = dict.fromkeys(("before", "after", "largest", "tiny", "scale"), "fp32")
    of = dict.fromkeys(("mean", "most", "scales", "common", "found"), "*fp32")
    of |= {"x": "*bf16", "k": "*bf16", "v": "*bf16"}
    compiled(extents, {"DIM": 128, "ROWS": 32, "SPAN": 256}, of)
    compiled(integers, integral, {**of, **factors, "codes": "*i8"})
    values = {**codes, "PLACES": 64, "ORDER": True, "CAREFUL": False}
    compiled(turned, values, {**of, "codes": "*fp8e4nv"})


def compiled(kernel: Any, fixed: dict[str, Any], types: dict[str, str], **options: int) -> Any:
    """A kernel for compute capability 9.0."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = kernel.arg_names
    taken = {n: types.get(n, "constexpr" if n in fixed else "i32") for n in names}
    source = ASTSource(kernel, taken, {(names.index(n),): fixed[n] for n in fixed})
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options)


if __name__ == "__main__":
    told = [n for n, case in CASES.items() if case.get("dtype") != "bfloat16"]
    answer(judge, [*told, "codes of threads", "codes of blocks"])
