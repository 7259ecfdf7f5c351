"""What the catalogue asks of attention in short windows; its kernels, case by case: `tests/kernels`."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import attlas
from attlas.ops.windows import joined, partition, plain, relative_bias, shift_mask, window_attend

HEADS, WIDTH = 2, 16


def swin(x: Tensor, table: Tensor, size: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """Swin's attention by the places of pixels: x [batch, height, width, 3 · heads · d] are q, k and v.

    Windows begin `shift` pixels into the image and go round it; pixels that met only going round it do
    not see each other.
    """
    _, height, width, _ = x.shape
    out = torch.zeros(*x.shape[:3], HEADS, WIDTH, dtype=x.dtype)
    q, k, v = x.unflatten(-1, (3, HEADS, WIDTH)).unbind(3)
    for top, left in itertools.product(range(0, height, size[0]), range(0, width, size[1])):
        at = [
            (top + i + shift[0], left + j + shift[1])
            for i, j in itertools.product(range(size[0]), range(size[1]))
        ]
        for i, j in at:
            seen = [(a, b) for a, b in at if a // height == i // height and b // width == j // width]
            keys, values = (
                torch.stack([t[:, a % height, b % width] for a, b in seen], 1) for t in (k, v)
            )
            numbers = [
                (i - a + size[0] - 1) * (2 * size[1] - 1) + j - b + size[1] - 1 for a, b in seen
            ]
            scores = torch.einsum("bhd,bshd->bsh", q[:, i % height, j % width], keys) / WIDTH**0.5
            weights = (scores + table[numbers]).softmax(1)
            out[:, i % height, j % width] = (weights[..., None] * values).sum(1)
    return out.flatten(3)


def by_windows(x: Tensor, table: Tensor, size: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    grid = (x.shape[1], x.shape[2])
    qkv = partition(x, size, shift).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
    seen = shift_mask(grid, size, shift) if any(shift) else None
    out = window_attend(*qkv, bias=relative_bias(table, size), mask=seen)
    return joined(out.transpose(1, 2).flatten(2), size, grid, shift)


def inputs(size: tuple[int, int], dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    """q, k and v of images of 2 × 2 windows, a table, and a gradient, as numbers of that precision."""
    torch.manual_seed(0)
    sides, distances = [2 * n for n in size], (2 * size[0] - 1) * (2 * size[1] - 1)
    shapes = ([batch, *sides, 3 * HEADS * WIDTH], [distances, HEADS], [batch, *sides, HEADS * WIDTH])
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


def results(
    run: Any, size: tuple[int, int], shift: tuple[int, int], given: torch.dtype, dtype: torch.dtype
) -> list[Tensor]:
    """The output, and the gradients of q, k, v and of the table, which stays in float32 as autocast has
    it: its gradient sums over all windows and pairs."""
    x, table, grad = (t.to(dtype) for t in inputs(size, given))
    table = table.to(torch.promote_types(dtype, torch.float32))
    x, table = x.requires_grad_(), table.requires_grad_()
    y = run(x, table, size, shift)
    return [t.detach().double() for t in (y, *torch.autograd.grad(y, [x, table], grad))]


SHAPES = [((3, 3), (0, 0)), ((4, 4), (2, 2)), ((3, 5), (1, 2)), ((3, 4), (0, 2)), ((7, 7), (3, 3))]


@pytest.mark.parametrize(("size", "shift"), SHAPES)
def test_it_is_swins_window_attention(size, shift):
    truth = results(swin, size, shift, torch.float32, torch.float64)
    exact = results(by_windows, size, shift, torch.float32, torch.float64)
    single = results(by_windows, size, shift, torch.float32, torch.float32)
    for ours, narrow, wanted in zip(exact, single, truth, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)
        assert (narrow - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1)


def by_kernel(side: int, written: str) -> list[float]:
    """Largest errors of the kernel's output and gradients, relative where numbers are above 1."""
    from attlas.kernels import windows_run
    from attlas.ops import windows

    dtype, shape = getattr(torch, written), ((side, side), (side // 2, side // 2))
    wanted = results(by_windows, *shape, dtype, torch.float64)
    with (
        patch.object(windows, "refuses", lambda *_: None),
        patch.object(windows_run, "units", lambda _: 1),
    ):
        found = results(by_windows, *shape, dtype, dtype)
    return [
        ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()
        for a, b in zip(found, wanted, strict=True)
    ]


#: What is allowed of output and gradients, for windows of so many pixels a side.
ALLOWED = {(7, "float16"): 1e-3, (8, "float16"): 1e-3, (7, "float32"): 1e-5, (8, "float32"): 1e-5}


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_kernel_equals_it_to_the_precision_that_is_asked():
    """By Triton's interpreter, which must be asked for before a kernel is defined."""
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for (case, allowed), errors in zip(ALLOWED.items(), found, strict=True):
        assert len(errors) == 3
        assert max(errors) <= allowed, (case, errors)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mask", [None, "seen", "numbers"])
def test_both_ways_without_a_kernel_agree(bias, mask):
    torch.manual_seed(0)
    q, k, v = (torch.randn(6, HEADS, 5, WIDTH, dtype=torch.float64).requires_grad_() for _ in range(3))
    added = torch.randn(HEADS, 5, 5, dtype=torch.float64).requires_grad_() if bias else None
    hidden = {
        None: None, "seen": torch.rand(3, 5, 5) > 0.5,
        "numbers": torch.randn(3, 5, 5, dtype=torch.float64),
    }[mask]  # fmt: skip
    numbers = torch.zeros(3, 5, 5).double().masked_fill(~hidden, -torch.inf) if mask == "seen" else hidden
    leaves, found = [q, k, v, *([added] if bias else [])], []
    for out in (
        window_attend(q, k, v, bias=added, mask=hidden, scale=0.3),
        plain(q, k, v, added, numbers, 0.3),
    ):  # fmt: skip
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_without_bias_and_mask_it_is_softmax_attention():
    q, k, v = (torch.randn(6, HEADS, 9, WIDTH, dtype=torch.float64) for _ in range(3))
    torch.testing.assert_close(window_attend(q, k, v), attlas.ops.attend(q, k, v))
    torch.testing.assert_close(window_attend(q, k, v, scale=0.0), v.mean(2, keepdim=True).expand_as(v))


def test_a_row_that_sees_nothing_gives_zero():
    q, k, v = (torch.randn(2, HEADS, 4, WIDTH).requires_grad_() for _ in range(3))
    seen = torch.ones(2, 4, 4, dtype=torch.bool)
    seen[1, 2] = False
    out = window_attend(q, k, v, mask=seen)
    out.sum().backward()
    assert out[1, :, 2].abs().max() == 0
    assert all(t.grad.isfinite().all() for t in (q, k, v))


def test_a_shift_cuts_windows_where_the_image_was_cut():
    seen = shift_mask((8, 8), (4, 4), (2, 2))
    assert [s.double().mean().item() for s in seen] == [1.0, 0.5, 0.5, 0.25]
    image = torch.randn(2, 8, 12, 3)
    assert torch.equal(joined(partition(image, (4, 3), (1, 2)), (4, 3), (8, 12), (1, 2)), image)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": torch.zeros(4, 2, 8, 16)}, "k must have the windows of q"),
        ({"v": torch.zeros(4, 1, 9, 16)}, "v must have the windows of q"),
        ({"bias": torch.zeros(3, 9, 9)}, "bias must be"),
        ({"mask": torch.zeros(2, 9, 8)}, "mask must be"),
        ({"mask": torch.zeros(3, 9, 9)}, "mask is of 3 windows, which must divide the 4 rows"),
        ({"mask": torch.zeros(2, 9, 9, requires_grad=True)}, "mask gets no gradient"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, said):
    given: dict[str, Any] = {name: torch.zeros(4, 2, 9, 16) for name in "qkv"} | change
    plain = getattr(window_attend, "__wrapped__", window_attend)  # without the checks of shapes of tests
    with pytest.raises(ValueError, match=said):
        plain(**given)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: partition(torch.zeros(1, 8, 9, 2), (4, 4)), "size=(4, 4) must divide"),
        (lambda: relative_bias(torch.zeros(48, 2), (4, 4)), "table must have 49 distances"),
    ],
)
def test_windows_that_do_not_fit_are_refused_by_name(call, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)")):
        call()


if __name__ == "__main__":
    print(json.dumps([by_kernel(*case) for case in ALLOWED]))
