"""multi-query-attention: multi-head attention with copied heads, and a cache that much smaller."""

from __future__ import annotations

import pytest
import torch

import attlas
from attlas import Attention


def _copied(layer: Attention) -> Attention:
    """The multi-head layer whose key and value heads are copies of this layer's one."""
    plain = Attention(layer.dim, layer.heads, causal=True, bias=True).double()
    state = layer.state_dict()
    for name in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"):
        state[name] = torch.cat([state[name]] * layer.heads)
    plain.load_state_dict(state)
    return plain


def test_multi_query_attention_equals_copied_heads() -> None:
    layer = attlas.make("multi-query-attention", dim=32, heads=4, causal=True, bias=True).double()
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x), _copied(layer)(x), atol=1e-6, rtol=0)


def test_multi_query_attention_holds_a_head_of_the_cache() -> None:
    held = {}
    for name in ("multi-query-attention", "softmax"):
        layer = attlas.make(name, dim=32, heads=4, causal=True)
        cache = layer.init_cache()
        layer(torch.randn(2, 11, 32), cache=cache)
        held[name] = cache.layers[0].keys.nbytes + cache.layers[0].values.nbytes
    assert held["multi-query-attention"] * 4 == held["softmax"]


@pytest.mark.parametrize(("kv_heads", "name"), [(1, "mqa"), (2, "gqa"), (4, "gqa")])
def test_multi_query_attention_from_a_multi_head_layer(kv_heads: int, name: str) -> None:
    plain = Attention(16, 4, bias=True)
    kind = type(attlas.make(name, dim=16, heads=4))
    layer = kind.from_multi_head(plain, kv_heads=kv_heads)
    grouped = plain.k_proj.weight.view(kv_heads, 4 // kv_heads, 4, 16).mean(1).view(-1, 16)
    torch.testing.assert_close(layer.k_proj.weight, grouped)
    assert torch.equal(layer.q_proj.weight, plain.q_proj.weight)
    if kv_heads == 4:
        x = torch.randn(1, 5, 16)
        torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize(("kv_heads", "name"), [(1, "mqa"), (2, "gqa"), (4, "gqa")])
def test_multi_query_attention_adopts_a_multi_head_layer(kv_heads: int, name: str) -> None:
    """Uptraining starts from the mean of each group's heads; grouped weights are taken as they are."""
    plain = Attention(16, 4, bias=True)
    layer = attlas.make(name, dim=16, heads=4, kv_heads=kv_heads, bias=True)
    assert layer.load_from(plain.state_dict()) == []
    converted = type(layer).from_multi_head(plain, kv_heads=kv_heads)
    again = attlas.make(name, dim=16, heads=4, kv_heads=kv_heads, bias=True)
    assert again.load_from(layer.state_dict()) == []
    for name, weight in converted.state_dict().items():
        assert torch.equal(layer.state_dict()[name], weight), name
        assert torch.equal(again.state_dict()[name], weight), name


def test_multi_query_attention_refuses_more_heads() -> None:
    with pytest.raises(ValueError, match="kv_heads must be 1"):
        attlas.make("mqa", dim=16, heads=4, kv_heads=2)
    layer = attlas.make("gqa", dim=16, heads=4, kv_heads=2)
    with pytest.raises(ValueError, match="a key head a query head"):
        type(layer).from_multi_head(layer)
