"""Attention to listed blocks: every route is the definition, and lists that are wrong are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attlas import masks, ops

#: Batch, heads, key heads, heads of lists, queries, keys, queries and keys of a block, width of values.
SHAPES = {
    "lengths that no block divides": (2, 4, 2, 4, 50, 50, 16, 8, 8),
    "lists of key heads, behind a cache": (2, 4, 2, 2, 33, 70, 8, 16, 8),
    "lists of one token": (2, 4, 2, 1, 20, 50, 1, 8, 8),
    "odd blocks, other values": (1, 4, 1, 4, 20, 50, 7, 9, 6),
    "one block": (1, 2, 2, 2, 12, 12, 16, 16, 8),
}


def tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    batch, heads, kv_heads, _, queries, keys, _, _, width = shape
    sizes = (heads, queries, 8), (kv_heads, keys, 8), (kv_heads, keys, width)
    return [torch.randn(batch, *size, dtype=dtype, requires_grad=True) for size in sizes]


def random_lists(shape: tuple[int, ...], share: float = 0.4, causal: bool = False) -> Tensor:
    """Lists of random lengths, empty ones among them."""
    batch, _, _, heads, queries, keys, q_block, k_block, _ = shape
    rows, columns = -(-queries // q_block), -(-keys // k_block)
    chosen = torch.rand(batch, heads, rows, columns) < share
    if causal:
        last = keys - queries + (torch.arange(rows) + 1) * q_block - 1
        chosen &= torch.arange(columns) * k_block <= last[:, None]
    return ops.as_lists(chosen)


@pytest.mark.parametrize("pattern", ["none", "causal", "causal and padding", "window"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_route_is_the_definition_forwards_and_backwards(name: str, pattern: str) -> None:
    shape = SHAPES[name]
    q, k, v = tensors(shape)
    bias = torch.randn(1, shape[2], shape[5], dtype=torch.float64, requires_grad=True)
    valid = torch.rand(shape[0], shape[5]) > 0.2
    mask = {"none": None, "causal": masks.causal, "window": masks.window(9),
            "causal and padding": masks.causal & masks.padding(valid)}[pattern]  # fmt: skip
    blocks, size = random_lists(shape, causal=pattern.startswith("causal")), shape[6:8]

    found = []
    for route in ("reference", "gather", "scatter"):
        out, lse = ops.block_sparse(
            q, k, v, blocks, size=size, mask=mask, bias=bias, return_lse=True, route=route
        )
        seen = lse.masked_fill(lse == -torch.inf, 0.0)
        weights = torch.linspace(0, 1, out.numel(), dtype=out.dtype).view_as(out)
        grads = torch.autograd.grad((out * weights).sum() + seen.sin().sum(), (q, k, v, bias))
        found.append((out, lse, *grads))
    for plain, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(other, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", ["none", "causal", "causal and padding"])
@pytest.mark.parametrize("keys", [20, 50, 61])
def test_packed_lists_of_single_tokens_are_the_definition(keys: int, pattern: str) -> None:
    shape = (2, 4, 2, 4, 20, keys, 1, 8, 6)
    q, k, v = tensors(shape)
    valid = torch.rand(2, keys) > 0.2
    mask = {"none": None, "causal": masks.causal,
            "causal and padding": masks.causal & masks.padding(valid)}[pattern]  # fmt: skip
    blocks = random_lists(shape, causal=pattern != "none")
    found = []
    for route in ("reference", "packed"):
        out, lse = ops.block_sparse(
            q, k, v, blocks, size=(1, 8), mask=mask, return_lse=True, route=route
        )
        seen = lse.masked_fill(lse == -torch.inf, 0.0)
        grads = torch.autograd.grad(out.sin().sum() + seen.sin().sum(), (q, k, v))
        found.append((out, lse, *grads))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


def test_a_row_of_no_block_gives_nothing_and_gets_no_gradient() -> None:
    q, k, v = tensors(SHAPES["one block"])
    blocks = torch.full((1, 2, 1, 3), -1)
    for route in ("reference", "gather", "scatter"):
        out, lse = ops.block_sparse(q, k, v, blocks, size=16, return_lse=True, route=route)
        assert not out.any()
        assert (lse == -torch.inf).all()
        assert all(not g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_blocks_are_exact_attention_within_twice_its_error(dtype: torch.dtype) -> None:
    shape = (2, 4, 2, 1, 90, 90, 16, 8, 8)
    q, k, v = (x.detach().to(dtype) for x in tensors(shape, torch.float32))
    blocks = torch.arange(12).expand(1, 1, 6, 12)
    exact = ops.attend(q.double(), k.double(), v.double(), mask=masks.causal)
    plain = ops.attend(q, k, v, mask=masks.causal, route="reference")
    wide = blocks.where(blocks * 8 <= torch.arange(6)[:, None] * 16 + 15, -1)
    ours = ops.block_sparse(q, k, v, wide, size=(16, 8), mask=masks.causal)
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_calls_over_disjoint_blocks_are_joined_by_merge() -> None:
    q, k, v = tensors(SHAPES["one block"])
    k, v = k.repeat(1, 1, 4, 1), torch.randn(1, 2, 48, 8, dtype=torch.float64)
    parts = [
        ops.block_sparse(
            q, k, v, torch.tensor(row).view(1, 1, 1, -1), size=16, q_offset=36, return_lse=True
        )
        for row in ([0, 2], [1])
    ]
    whole = ops.attend(q, k, v, q_offset=36)
    torch.testing.assert_close(ops.merge(parts)[0], whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("route", ["gather", "scatter"])
def test_a_gradient_of_the_gradient(route: ops.BlockRoute) -> None:
    shape = (1, 1, 1, 1, 4, 4, 2, 2, 8)
    blocks = random_lists(shape, 1.0, causal=True)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.block_sparse(q, k, v, blocks, size=2, mask=masks.causal, route=route)

    assert torch.autograd.gradgradcheck(f, tensors(shape))


def test_memory_is_that_of_what_is_listed() -> None:
    """16384 tokens, four blocks of 64 each: all pairs of one head would be 1 GiB."""
    q, k, v = (torch.randn(1, 1, 16384, 8) for _ in range(3))
    blocks = torch.arange(4).expand(1, 1, 256, 4)
    held: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            held.extend(x.nbytes for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, Tensor))
            return out

    with Watch():
        ops.block_sparse(q, k, v, blocks, size=64)
    assert max(held) < 2**24


@pytest.mark.parametrize(("blocks", "told"), [
    (torch.tensor([[[[1, 0]]]]), "does not ascend"),
    (torch.tensor([[[[0, 0]]]]), "twice"),
    (torch.tensor([[[[-1, 0]]]]), "behind −1"),
    (torch.tensor([[[[-2]]]]), "below −1"),
    (torch.tensor([[[[3]]]]), "0..2"),
    (torch.tensor([[[[0], [1]]]]), r"blocks takes \[1 or 1, 1, 2 or 2, 1, count\]"),
    (torch.zeros(1, 1, 1, 0, dtype=torch.long), "each at least 1"),
    (torch.tensor([[[[0]], [[0]], [[0]]]]), "blocks takes"),
])  # fmt: skip
def test_lists_that_are_wrong_are_refused(blocks: Tensor, told: str) -> None:
    q, k, v = (torch.randn(1, 2, n, 8) for n in (16, 48, 48))
    with pytest.raises(ValueError, match=told):
        ops.block_sparse(q, k, v, blocks, size=16)


def test_other_calls_that_are_wrong_are_refused() -> None:
    q, k, v = (torch.randn(1, 2, n, 8) for n in (16, 48, 48))
    blocks = torch.tensor([[[[0, 2]]]])
    with pytest.raises(ValueError, match="future"):
        ops.block_sparse(q, k, v, blocks, size=16, mask=masks.causal, q_offset=0)
    with pytest.raises(ValueError, match="size"):
        ops.block_sparse(q, k, v, blocks, size=0)
    with pytest.raises(ValueError, match="bias"):
        ops.block_sparse(q, k, v, blocks, size=16, bias=torch.zeros(1, 2, 16))
    with pytest.raises(ValueError, match="keys and values alike"):
        ops.block_sparse(q, k, v[:, :1], blocks, size=16)
