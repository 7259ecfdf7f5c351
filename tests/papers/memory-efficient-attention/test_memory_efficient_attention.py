"""memory-efficient-attention: equals the dense formula to 1e-10, in memory that grows as √n."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attlas import masks, ops
from attlas.contract.layers.numbers import LargestTensor
from attlas.positions import ALiBi, T5Bias

# It is beartype, which looks at a random item of each list, that uses it.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

kinds = st.sampled_from(["none", "causal", "window", "dense", "padding"])


@given(
    queries=st.integers(1, 30), keys=st.integers(1, 40), kv=st.sampled_from([1, 2, 4]),
    q_chunk=st.integers(1, 12), k_chunk=st.integers(1, 20), kind=kinds, biased=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_memory_efficient_attention_equals_the_dense_formula(
    queries: int, keys: int, kv: int, q_chunk: int, k_chunk: int, kind: str, biased: bool
) -> None:
    shapes = ((2, 4, queries, 5), (2, kv, keys, 5), (2, kv, keys, 3))
    ours = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    mask: Any = {
        "none": None,
        "causal": masks.causal,
        "window": masks.causal & (masks.window(4) | masks.sinks(1)),
        "dense": torch.rand(2, 1, queries, keys) > 0.5,
        "padding": masks.padding(torch.arange(keys) < torch.tensor([[keys], [keys // 2]])),
    }[kind]
    bias = T5Bias(4).double() if biased else None
    mod = bias.score_mod if bias is not None else None
    found = ops.memory_efficient(*ours, mask=mask, score_mod=mod, q_chunk=q_chunk, k_chunk=k_chunk)
    grad = torch.randn_like(found[0])
    (found[0] * grad).sum().backward()
    trained = bias.weight.grad.clone() if bias is not None else None
    if bias is not None:
        bias.weight.grad = None
    wanted = ops.reference(
        *theirs, mask=mask, score_mod=mod, scale=5**-0.5, q_offset=keys - queries
    )
    (wanted[0] * grad).sum().backward()
    exact: dict[str, Any] = {"atol": 1e-10, "rtol": 0}
    torch.testing.assert_close(found[0], wanted[0], **exact)
    torch.testing.assert_close(found[1], wanted[1], **exact)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, **exact)
    if bias is not None:
        torch.testing.assert_close(trained, bias.weight.grad, **exact)


def _largest(length: int, backward: bool) -> int:
    q, k, v = (torch.randn(1, 1, length, 4).requires_grad_(backward) for _ in range(3))
    with LargestTensor() as seen:
        out, _ = ops.memory_efficient(q, k, v, mask=masks.causal)
        if backward:
            out.sum().backward()
    return seen.elements


@pytest.mark.parametrize("backward", [False, True])
def test_memory_efficient_attention_memory_grows_as_the_root_of_the_length(backward: bool) -> None:
    short, long = _largest(2048, backward), _largest(8192, backward)
    assert long <= 2.1 * short  # four times the length, twice the chunk
    assert _largest(8192, backward) < 0.05 * 8192**2


def test_memory_efficient_attention_visits_no_empty_block() -> None:
    visited = []

    def count(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        visited.append(score.numel())
        return score

    q, k, v = (torch.randn(1, 1, 4096, 4) for _ in range(3))
    ops.memory_efficient(q, k, v, mask=masks.causal & masks.window(128), score_mod=count)
    assert sum(visited) < 0.15 * 4096**2


def test_memory_efficient_attention_takes_what_it_gives_in_any_precision() -> None:
    q, k, v = (torch.randn(1, 2, 33, 8, dtype=torch.bfloat16) for _ in range(3))
    out, lse = ops.memory_efficient(q, k, v, score_mod=ALiBi(2).score_mod)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
