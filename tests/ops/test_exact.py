"""What autocast and half precision must not reach."""

from __future__ import annotations

import pytest
import torch

from attlas import ops

HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("update", ["additive", "delta", "both ways"])
def test_a_recurrence_is_the_same_under_autocast(update: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (300 * torch.randn(1, 2, 70, 8) for _ in range(3))  # beyond float16 once multiplied
    options = {"log_decay": torch.full((2,), -0.1), "causal": update != "both ways"}
    if update == "delta":
        k = k / k.norm(dim=-1, keepdim=True)
        options["beta"] = torch.rand(1, 2, 70)
    wanted, state = ops.recurrence(q, k, v, **options)
    with torch.autocast("cpu", dtype=dtype):
        found, held = ops.recurrence(q, k, v, **options)
        assert torch.is_autocast_enabled("cpu")
        assert (q @ k.mT).dtype == dtype
    assert torch.equal(found, wanted)
    assert state is None or torch.equal(held, state)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_unit_vector_of_nothing_is_nothing(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 4, dtype=dtype, requires_grad=True)
    y = ops.unit(x)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert x.grad is not None
    assert x.grad.isfinite().all()
    torch.testing.assert_close(
        ops.unit(torch.ones(1, 4, dtype=dtype)), torch.full((1, 4), 0.5, dtype=dtype)
    )
