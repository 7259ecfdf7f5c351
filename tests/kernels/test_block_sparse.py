"""The kernels for listed blocks, by Triton's interpreter where there is no GPU, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from interpreted import MARKS, answer, verdicts
from torch import Tensor

from attlas import masks, ops
from attlas.ops import block_kernels

pytestmark = MARKS

#: What a case is when it says nothing else; `lists` are the heads that have lists of their own, and an
#: `offset` of None stands for the last query at the last key.
PLAIN: dict[str, Any] = {
    "batch": 1, "heads": 2, "kv_heads": 2, "lists": 2, "queries": 64, "keys": 64, "width": 16,
    "size": (16, 16), "mask": "none", "offset": None, "dtype": "float32", "bias": False, "share": 0.5,
    "descriptors": False,
}  # fmt: skip
MASKS: dict[str, Callable[[int, int], masks.Mask | None]] = {
    "none": lambda batch, keys: None,
    "causal": lambda batch, keys: masks.causal,
    "padding": lambda batch, keys: masks.padding(padded(batch, keys)),
    "causal and padding": lambda batch, keys: masks.padding(padded(batch, keys)) & masks.causal,
}
CASES: dict[str, dict[str, Any]] = {
    "whole blocks": {"bias": True, "queries": 48, "keys": 32},
    "causal": {"mask": "causal", "queries": 48, "keys": 48},
    "lengths that no block divides": {
        "batch": 2, "queries": 50, "keys": 70, "size": (16, 32), "mask": "causal and padding",
        "bias": True,
    },
    "no mask, ragged": {"queries": 37, "keys": 45, "size": (32, 16), "width": 24},
    "lists of key heads, whose heads share programs": {
        "heads": 3, "kv_heads": 1, "lists": 1, "mask": "causal", "queries": 30, "keys": 40,
    },
    "lists of all heads, too many rows for one program": {
        "heads": 4, "lists": 1, "size": (32, 16), "mask": "padding", "queries": 40, "keys": 40,
    },
    "a list a token and key head": {
        "heads": 6, "lists": 2, "queries": 4, "keys": 40, "size": (1, 16), "mask": "causal",
        "bias": True,
    },
    "a list a token and head": {
        "kv_heads": 1, "queries": 5, "keys": 40, "size": (1, 16), "mask": "causal",
    },
    "large blocks in tiles": {
        "size": (64, 64), "queries": 70, "keys": 100, "mask": "causal", "heads": 1, "kv_heads": 1,
        "lists": 1, "share": 0.8,
    },
    "queries before the keys": {
        "queries": 50, "keys": 30, "size": (32, 32), "mask": "causal", "offset": -20,
    },
    "no block at all": {"share": 0.0, "bias": True, "queries": 20, "keys": 20},
    "float16": {"dtype": "float16", "mask": "causal", "queries": 30, "keys": 30},
    "descriptors": {
        "descriptors": True, "mask": "causal", "queries": 36, "keys": 50, "size": (16, 32),
    },
}  # fmt: skip
#: On a GPU alone, in tiles of their own: mask, size of blocks, lists, tokens, width, type.
LARGE: dict[str, dict[str, Any]] = {
    f"{mask}, {size}, {lists} lists, {length} of {width} in {dtype}": {
        "batch": 2, "heads": 8, "kv_heads": 2, "lists": lists, "queries": length, "keys": length,
        "width": width, "size": size, "mask": mask, "dtype": dtype, "bias": mask == "none",
        "share": 0.3,
    }
    for mask, size, lists, length, width, dtype in (
        ("none", (128, 128), 8, 2048, 128, "bfloat16"),
        ("causal", (128, 128), 8, 2048, 128, "bfloat16"),
        ("causal", (128, 128), 2, 1101, 128, "bfloat16"),
        ("causal and padding", (64, 64), 8, 2048, 128, "bfloat16"),
        ("causal", (64, 64), 1, 2048, 128, "bfloat16"),
        ("causal", (64, 64), 2, 1100, 64, "bfloat16"),
        ("padding", (128, 64), 1, 2048, 64, "bfloat16"),
        ("causal", (16, 64), 2, 1100, 128, "bfloat16"),
        ("none", (1, 64), 2, 515, 128, "bfloat16"),
        ("causal", (1, 64), 2, 515, 64, "float16"),
        ("causal", (128, 512), 8, 2048, 128, "bfloat16"),
        ("none", (32, 32), 8, 1088, 80, "float16"),
        ("causal", (64, 64), 8, 1030, 256, "bfloat16"),
        ("causal", (64, 64), 8, 1030, 64, "float32"),
        ("none", (64, 128), 2, 1030, 128, "float32"),
        ("none", (16, 32), 2, 300, 256, "float32"),
    )
}  # fmt: skip


def padded(batch: int, keys: int) -> Tensor:
    """Rows that begin or end with padding."""
    valid = torch.ones(batch, keys, dtype=torch.bool)
    valid[0, :5] = False
    valid[-1, -3:] = False
    return valid


def lists_of(case: dict[str, Any], offset: int) -> Tensor:
    """Random lists, under `causal` of what is not wholly in the future."""
    (q_block, k_block), queries, keys = case["size"], case["queries"], case["keys"]
    rows, columns = -(-queries // q_block), -(-keys // k_block)
    chosen = torch.rand(case["batch"], case["lists"], rows, columns) < case["share"]
    if case["mask"].startswith("causal"):
        last = offset + (torch.arange(rows) + 1) * q_block - 1
        chosen &= torch.arange(columns) * k_block <= last[:, None]
    return ops.as_lists(chosen)


def small(device: str, case: dict[str, Any]) -> ExitStack:
    """Without a GPU kernels take every call, in small tiles."""
    stack = ExitStack()
    if device == "cpu":
        from attlas.kernels import block_sparse_run as run

        stack.enter_context(patch.dict(run.TILES, {
            **dict.fromkeys(run.TILES, run.Tile(32, 16, 4, 1, True)),
            **{n: run.Tile(16, 16, 4, 1, True) for n in run.TILES if n[0] == "keys"},
        }))  # fmt: skip
        stack.enter_context(patch.object(run, "_by_tma", lambda *x: case["descriptors"]))
        stack.enter_context(patch.object(block_kernels, "refuses", lambda *x: None))
        stack.enter_context(patch("torch.cuda.device_of", lambda x: nullcontext()))
    return stack


def errors(name: str, device: str = "cpu") -> dict[str, tuple[float, float]]:
    """Of every result against float64, and what is allowed: twice that of the plain route, and a bit."""
    case = {**PLAIN, **{**CASES, **LARGE}[name]}
    torch.manual_seed(0)
    batch, heads, kv_heads, queries, keys, width = (
        case[n] for n in ("batch", "heads", "kv_heads", "queries", "keys", "width")
    )
    offset = keys - queries if case["offset"] is None else case["offset"]
    dtype, mask = getattr(torch, case["dtype"]), MASKS[case["mask"]](batch, keys)
    blocks = lists_of(case, offset).to(device)
    # Tokens before heads, as a layer has them, and the reverse.
    q = torch.randn(batch, queries, heads, width).transpose(1, 2)
    k = torch.randn(batch, keys, kv_heads, width).transpose(1, 2)
    v, d_out = torch.randn(batch, kv_heads, keys, width), torch.randn(batch, heads, queries, width)
    given = [x.to(device, dtype) for x in (q, k, v)]
    bias = torch.randn(batch, kv_heads, keys, device=device) if case["bias"] else None
    d_lse = torch.randn(batch, heads, queries, device=device)

    def results(route: Any, of: torch.dtype) -> dict[str, Tensor]:
        copies = (x.detach().clone().to(of).requires_grad_() for x in given)
        leaves = dict(zip("qkv", copies, strict=True))
        if bias is not None:
            wide = torch.promote_types(of, torch.float32)
            leaves["bias"] = bias.clone().to(wide).requires_grad_()
        out, lse = ops.block_sparse(
            *list(leaves.values())[:3], blocks, size=case["size"], mask=mask, bias=leaves.get("bias"),
            q_offset=offset, return_lse=True, route=route,
        )  # fmt: skip
        seen = lse > -torch.inf
        torch.autograd.backward((out, lse.where(seen, 0.0)), (d_out.to(out), d_lse.to(lse)))
        grads = {f"d{n}": x.grad for n, x in leaves.items()}
        found = {"out": out.detach(), "lse": lse.detach().where(seen, -1e3), **grads}
        return {n: x.double() for n, x in found.items() if x is not None}

    with small(device, case):
        ours = results("kernel", dtype)
        again = results("kernel", dtype) if device == "cuda" else ours
    plain, true = results("reference", dtype), results("reference", torch.float64)
    assert all(torch.equal(ours[n], again[n]) for n in ours)
    unit, allowed = torch.finfo(dtype).eps, {}
    for part, exact in true.items():
        off, theirs = ((x[part] - exact).abs().max().item() for x in (ours, plain))
        allowed[part] = (off, 2 * theirs + 2 * unit * exact.abs().max().clamp(min=1.0).item())
    return allowed


def twice(device: str = "cpu") -> dict[str, tuple[float, float]]:
    """Of a gradient of a gradient, which goes by all pairs."""
    torch.manual_seed(0)
    blocks = torch.tensor([[[[0, -1], [0, 1]]]], dtype=torch.int32, device=device)
    given = [torch.randn(1, 1, 32, 16, device=device) for _ in range(3)]
    found = []
    for route, dtype in (("kernel", torch.float32), ("reference", torch.float64)):
        q, k, v = (x.to(dtype).requires_grad_() for x in given)
        with small(device, PLAIN):
            out = ops.block_sparse(q, k, v, blocks, size=16, mask=masks.causal, route=route)
            (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
            found.append(torch.autograd.grad(grad.square().sum(), k)[0].double())
    return {"dk": ((found[0] - found[1]).abs().max().item(), 1e-4 * found[1].abs().max().item())}


def judge(name: str, device: str = "cpu") -> dict[str, tuple[float, float]]:
    return twice(device) if name == "twice" else errors(name, device)


@pytest.fixture(scope="module")
def judged() -> Iterator[Callable[[str], Any]]:
    with verdicts(__file__, judge) as told:
        yield told


@pytest.mark.parametrize("name", [*CASES, *LARGE])
def test_kernels_are_as_exact_as_the_plain_route(name: str, judged: Any) -> None:
    found = judged(name)
    assert {"out", "lse", "dq", "dk", "dv"} <= set(found)
    assert not {part: pair for part, pair in found.items() if not pair[0] <= pair[1]}


def test_gradients_can_be_differentiated(judged: Any) -> None:
    assert all(off <= allowed for off, allowed in judged("twice").values())


def test_lists_are_turned_round() -> None:
    run = pytest.importorskip("attlas.kernels.block_sparse_run")
    blocks = torch.tensor([[[[0, 2], [2, -1], [-1, -1], [0, 1]], [[-1, -1], [1, -1], [1, 2], [1, -1]]]])
    order, begins = run.turned(blocks, 4)
    found = [
        [order[begins[5 * n + j] : begins[5 * n + j + 1]].tolist() for j in range(4)] for n in (0, 1)
    ]
    assert found == [[[0, 3], [3], [0, 1], []], [[], [1, 2, 3], [2], []]]


@pytest.mark.parametrize(("change", "told"), [
    ({}, "not on a CUDA device"),
    ({"size": (16, 8)}, "keys from 16"),
    ({"size": (16, 48)}, "powers of two"),
    ({"mask": masks.window(3)}, "causal, padding, or both"),
    ({"mask": masks.causal & masks.window(3)}, "causal, padding, or both"),
    ({"mask": masks.causal | masks.padding(torch.ones(1, 64).bool())}, "causal, padding, or both"),
    ({"mask": masks.padding(torch.ones(2, 64).bool())}, "padding tells of"),
    ({"width": 8}, "from 16 to 256"),
    ({"values": 32}, "not alike"),
    ({"scale": -1.0}, "not above 0"),
    ({"dtype": torch.float64}, "not all of one of"),
])  # fmt: skip
def test_calls_that_kernels_cannot_take_are_refused(change: dict[str, Any], told: str) -> None:
    case = {"size": (16, 16), "mask": None, "width": 16, "scale": 0.25, "dtype": torch.float32, **change}

    class OnDevice(Tensor):
        is_cuda = True

    def made(width: int, dtype: torch.dtype = case["dtype"]) -> Tensor:
        x = torch.zeros(1, 2, 64, width).to(dtype)
        return x.as_subclass(OnDevice) if change else x

    q, k, v = (made(case["width"]), made(case["width"]), made(case.get("values", case["width"])))
    blocks = made(1, torch.int64)
    why = block_kernels.refuses(q, k, v, blocks, case["size"], case["mask"], case["scale"])
    assert why is not None
    assert told in why
    if not change:
        with pytest.raises(ValueError, match=told):
            ops.block_sparse(q, k, v, blocks[:, :, :4], size=16, route="kernel")


def test_masks_that_kernels_know() -> None:
    valid = torch.ones(1, 4, dtype=torch.bool)
    pad = masks.padding(valid)
    assert block_kernels.inside(None) == (False, None)
    assert block_kernels.inside(masks.causal) == (True, None)
    assert block_kernels.inside(pad) == (False, valid)
    assert block_kernels.inside(pad & masks.causal) == (True, valid)
    assert block_kernels.inside(pad & pad) is None


if __name__ == "__main__":
    answer(judge, [*CASES, "twice"])
