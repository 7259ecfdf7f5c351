"""Listed blocks on a GPU: which route takes a call, and what it asks of the device."""

from unittest.mock import patch

import pytest
import torch

from attlas import masks, ops
from attlas.ops import block_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def inputs(tokens: int = 512, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    torch.manual_seed(0)
    heads = 4, 2, 2
    return [
        torch.randn(1, h, tokens, 64, device="cuda", dtype=dtype).requires_grad_() for h in heads
    ]


def lists(tokens: int = 512, size: int = 64) -> torch.Tensor:
    """The first block and a block's own."""
    own = torch.arange(tokens // size, device="cuda")
    rows = torch.stack((torch.where(own > 0, 0, -1), own), -1).sort(-1, descending=False).values
    return torch.where(own[:, None] > 0, rows, torch.tensor([0, -1], device="cuda"))[None, None]


def taken():
    return patch.object(block_kernels, "attended", wraps=block_kernels.attended)


def test_auto_takes_the_kernel_which_is_the_definition():
    q, k, v = inputs()
    options = {"size": 64, "mask": masks.causal, "return_lse": True}
    with taken() as ran:
        ours = ops.block_sparse(q, k, v, lists(), **options)
    assert ran.call_count == 1
    plain = ops.block_sparse(q, k, v, lists(), **options, route="reference")
    exact = ops.block_sparse(
        q.double(), k.double(), v.double(), lists(), **options, route="reference"
    )
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        assert (mine - true).abs().max() <= 2 * (theirs - true).abs().max() + 1e-6


def test_attend_takes_it_for_a_pattern_over_pages():
    q, k, v = inputs()
    mask = masks.pages(lists(), 64) & masks.causal
    with taken() as ran:
        found = ops.attend(q, k, v, mask=mask)
    assert ran.call_count == 1
    torch.testing.assert_close(
        found, ops.attend(q, k, v, mask=mask, route="reference"), rtol=2e-2, atol=2e-2
    )


def test_other_masks_are_gathered():
    q, k, v = inputs()
    with taken() as ran:
        found = ops.block_sparse(q, k, v, lists(), size=64, mask=masks.window(9))
        assert ran.call_count == 0
        with pytest.raises(ValueError, match="causal, padding, or both"):
            ops.block_sparse(q, k, v, lists(), size=64, mask=masks.window(9), route="kernel")
    plain = ops.block_sparse(q, k, v, lists(), size=64, mask=masks.window(9), route="reference")
    torch.testing.assert_close(found, plain, rtol=2e-2, atol=2e-2)


def test_nothing_is_asked_of_the_device_forwards_and_backwards():
    """As a captured graph needs: lists are turned round where they are."""
    q, k, v = inputs()
    blocks, scale = lists(), 0.125

    def run() -> list[torch.Tensor]:
        out, _ = block_kernels.attended(q, k, v, blocks, (64, 64), masks.causal, None, scale, 0)
        return [out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]

    first = run()
    torch.cuda.synchronize()
    with patch("torch.cuda.synchronize", side_effect=AssertionError):
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_long_text_keeps_no_pairs():
    """131072 tokens, four blocks of 128 each: all pairs of one head would be 32 GiB in bfloat16."""
    tokens, size = 131072, 128
    q, k, v = (
        torch.randn(1, 1, tokens, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    )
    blocks = torch.arange(4, device="cuda").expand(1, 1, tokens // size, 4)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = ops.block_sparse(q, k, v, blocks, size=size)
    out.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 16 * q.nbytes
    few, _ = ops.reference(q[:, :, :64], k[:, :, :512], v[:, :, :512], scale=0.125, mask=None)
    torch.testing.assert_close(out[:, :, :64], few, rtol=2e-2, atol=2e-2)
