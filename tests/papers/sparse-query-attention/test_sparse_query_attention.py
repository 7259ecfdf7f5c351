"""sparse-query-attention: fewer query heads of the same width, and as much less to compute."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attlas

X = torch.randn(2, 11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _layer(**options):
    torch.manual_seed(0)
    return attlas.make("sparse-query-attention", dim=32, heads=8, **options).double().eval()


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_sparse_query_attention_with_all_query_heads_is_grouped_query(kv_heads: int) -> None:
    layer = _layer(query_heads=8, kv_heads=kv_heads, causal=True, position="rope")
    grouped = attlas.make("gqa", dim=32, heads=8, kv_heads=kv_heads, causal=True, position="rope")
    grouped.double().load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(X), grouped(X), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("variant", "queries", "keys"),
    [("symmetric", 4, 4), ("standard", 4, 2), ("extreme", 2, 2), ("light", 6, 2)],
)
def test_sparse_query_attention_variants(variant: str, queries: int, keys: int) -> None:
    layer = _layer(variant=variant)
    assert (layer.heads, layer.kv_heads, layer.head_dim) == (queries, keys, 4)
    assert layer.q_proj.weight.shape == (queries * 4, 32)
    assert layer.k_proj.weight.shape == layer.v_proj.weight.shape == (keys * 4, 32)
    assert layer.o_proj.weight.shape == (32, queries * 4)


@pytest.mark.parametrize("variant", ["symmetric", "extreme", "light"])
def test_sparse_query_attention_flops_fall_by_the_share_of_heads(variant: str) -> None:
    """Scores and sums, counted: H_q / H of what all heads take; time is the benchmark's to measure."""
    counted = []
    for layer in (_layer(variant=variant), _layer(query_heads=8, kv_heads=8)):
        q, k, v, inputs = layer.prepare(X)
        with FlopCounterMode(display=False) as counter:
            layer.aggregate(layer.weigh(q, k, inputs), v, inputs)
        counted.append(counter.get_total_flops())
    assert counted[0] * 8 == counted[1] * _layer(variant=variant).heads


def test_sparse_query_attention_stays_one_fused_call(monkeypatch) -> None:
    from attlas import attention

    calls, attend = [], attention.ops.attend
    monkeypatch.setattr(attention.ops, "attend", lambda *a, **k: calls.append(1) or attend(*a, **k))
    _layer(causal=True)(X)
    assert calls == [1]


def test_sparse_query_attention_refuses_what_does_not_fit() -> None:
    wrong = ({"query_heads": 9}, {"query_heads": 0}, {"variant": "tiny"}, {"kv_heads": 3})
    for options in wrong:
        with pytest.raises((ValueError, TypeError), match=next(iter(options))):
            _layer(**options)
