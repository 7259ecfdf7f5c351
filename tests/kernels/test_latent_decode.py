"""The latent kernel, run by Triton's interpreter where there is no GPU, against float64."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from interpreted import MARKS, answer, verdicts

from attlas import masks, ops
from attlas.ops import latent as op

pytestmark = MARKS

#: Inputs of each case of which the plain form's errors are taken.
DRAWS = 5
#: What a case is when it says nothing else; `units` multiprocessors cut the tokens into runs.
PLAIN: dict[str, Any] = {
    "batch": 1, "heads": 4, "queries": 1, "keys": 70, "latent": 64, "rotary": 16,
    "dtype": "float32", "mask": None, "units": 4, "cut": None, "view": False, "size": 1.0,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "one run": {"units": 1},
    "several runs": {"units": 3, "keys": 300},
    "more units than blocks": {"units": 64},
    "one token": {"keys": 1, "latent": 128},
    "whole blocks": {"keys": 256},
    "batch": {"batch": 3, "keys": 150},
    "one head": {"heads": 1},
    "blocks of heads": {"heads": 21},
    "queries without a mask": {"queries": 3},
    "causal queries": {"queries": 8, "mask": "causal"},
    "causal, fewer tokens than queries": {"queries": 5, "keys": 3, "mask": "causal"},
    "padding": {"batch": 2, "mask": "padding", "keys": 200},
    "padding and causal": {"batch": 2, "queries": 3, "mask": "padding causal"},
    "pair by pair": {"batch": 2, "queries": 2, "mask": "pairs", "keys": 200},
    "rows that see nothing": {"queries": 2, "mask": "blind", "keys": 200},
    "odd rotary width": {"rotary": 6},
    "rotary wider than a power of two": {"rotary": 48, "latent": 128},
    "latent 512": {"latent": 512, "rotary": 64, "heads": 16},
    "views": {"batch": 2, "view": True, "keys": 130},
    "extreme scores": {"size": 100.0},
    "bfloat16": {"dtype": "bfloat16", "keys": 300},
    "float16": {"dtype": "float16", "queries": 2, "mask": "causal", "keys": 150},
    "rows of 64": {"heads": 20, "queries": 4, "cut": (64, 32, 8, 2), "mask": "causal"},
    "two programs a unit": {"cut": (16, 32, 4, 2, 2), "units": 2, "keys": 300},
}


def inputs(device: str, draw: int = 0, **given: Any) -> tuple[list[torch.Tensor], Any]:
    """(content, turned, tokens) and the mask of one case."""
    case = {**PLAIN, **given}
    torch.manual_seed(draw)
    batch, heads, queries, keys = (case[n] for n in ("batch", "heads", "queries", "keys"))
    latent, rotary = case["latent"], case["rotary"]
    q = torch.randn(batch, queries, heads, latent + rotary) * case["size"]
    tokens = torch.randn(batch, keys, latent + rotary)
    q, tokens = (t.to(device, getattr(torch, case["dtype"])) for t in (q, tokens))
    if case["view"]:  # part of a longer cache, whose tokens lie between those of another
        tokens = torch.stack((tokens, tokens.new_full(tokens.shape, torch.nan)), dim=2)[:, :, 0]
        q = q.transpose(1, 2)
    else:
        q = q.transpose(1, 2).contiguous()
    valid = torch.arange(keys) >= torch.tensor([0, keys // 3, keys])[:batch, None]
    pairs = torch.rand(batch, heads, queries, keys) > 0.5
    mask = {
        None: None,
        "causal": masks.causal,
        "padding": masks.padding(valid.to(device)),
        "padding causal": masks.causal & masks.padding(valid.to(device)),
        "pairs": pairs.to(device),
        "blind": (torch.arange(queries)[:, None] != 0).expand(1, 1, queries, keys).to(device),
    }[case["mask"]]
    return [q[..., :latent], q[..., latent:], tokens[:, None]], mask


def errors(name: str, device: str = "cpu") -> tuple[float, float]:
    """Of the kernel against float64, and what is allowed: twice the plain form's, and an ulp."""
    from attlas.kernels.latent_decode import Tiles, latent_decode

    case = {**PLAIN, **CASES[name]}
    if device == "cuda" and case["dtype"] == "float32":  # not taken there
        case["dtype"] = "float16"
    given, mask = inputs(device, **case)
    flag = mask is masks.causal
    keys, queries = case["keys"], case["queries"]
    visible = None if flag else ops.as_dense(mask, queries, keys, keys - queries, given[0].device)
    cut = Tiles(*case["cut"]) if case["cut"] else None
    found = latent_decode(
        *given, scale=0.125, causal=flag, visible=visible, cut=cut, multiprocessors=case["units"]
    )
    exact = ops.latent_attend(*(t.double() for t in given), scale=0.125, mask=mask)
    assert found.dtype == given[0].dtype
    assert found.shape == exact.shape
    unit = torch.finfo(found.dtype).eps * exact.abs().max().item()
    return (found.double() - exact).abs().max().item(), 2 * plain_error(device, case) + unit


def plain_error(device: str, case: dict[str, Any]) -> float:
    """The largest of several draws, since one may happen to be off by next to nothing."""
    largest = 0.0
    for draw in range(DRAWS):
        given, mask = inputs(device, draw, **case)
        exact = ops.latent_attend(*(t.double() for t in given), scale=0.125, mask=mask)
        plain = op.plain(*given, scale=0.125, mask=mask)
        largest = max(largest, (plain.double() - exact).abs().max().item())
    return largest


@pytest.fixture(scope="module")
def judged() -> Iterator[Callable[[str], Any]]:
    with verdicts(__file__, errors) as told:
        yield told


@pytest.mark.parametrize("name", CASES)
def test_latent_kernel_is_as_exact_as_the_plain_form(name: str, judged: Any) -> None:
    error, allowed = judged(name)
    assert error <= allowed


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("masked", [False, True])
def test_latent_kernels_compile_for_a_gpu_that_is_not_there(dtype: str, masked: bool) -> None:
    """The interpreter takes what the compiler refuses: names that change their type in a loop."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from attlas.kernels import latent_decode as kernels

    bytes_each = 4 if dtype == "fp32" else 2
    cut = kernels.tiles(16, 512, 64, bytes_each, 227 * 1024)
    fixed = {
        "LATENT": 512, "ROTARY": 64, "ROTARY_ROOM": 64, "ROWS": cut.rows, "KEYS": cut.keys,
        "CAUSAL": masked, "MASKED": masked, "COLUMNS": 64, "AT_ONCE": 32, "ALL": 256,
    }  # fmt: skip
    pointers = dict.fromkeys(("content", "rotated", "tokens", "out"), f"*{dtype}")
    pointers |= {"sums": "*fp32", "lses": "*fp32", "visible": "*u8", "factor": "fp32"}
    for kernel in (kernels._over_a_run, kernels._over_runs):
        names = kernel.arg_names
        taken = {n: pointers.get(n, "constexpr" if n in fixed else "i32") for n in names}
        source = ASTSource(
            kernel, taken, {(names.index(n),): fixed[n] for n in names if n in fixed}
        )
        made = compile(
            source, target=GPUTarget("cuda", 90, 32),
            options={"num_warps": cut.warps, "num_stages": cut.stages},
        )  # fmt: skip
        assert made.metadata.shared <= 227 * 1024


def test_importing_attlas_imports_no_triton() -> None:
    code = "import sys, attlas, attlas.ops, attlas.layers; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_latent_kernel_is_not_for_the_host() -> None:
    assert not op.kernel_takes(*inputs("cpu")[0])


def test_tiles_leave_room_in_every_devices_shared_memory() -> None:
    from attlas.kernels.latent_decode import tiles

    for rows, latent, size, kib in product((1, 16, 32, 1024), op.WIDTHS, (2, 4), (99, 163, 227)):
        cut = tiles(rows, latent, 64, size, kib * 1024)
        queries, tokens = cut.rows * (latent + 64), cut.keys * (latent + 64)
        # A pipeline of so many stages holds one block of tokens less.
        assert (queries + max(1, cut.stages - 1) * tokens) * size <= kib * 1024
        assert cut.stages >= (1 if kib < 227 else 2)


if __name__ == "__main__":
    answer(errors, [n for n, case in CASES.items() if case.get("dtype") != "bfloat16"])
