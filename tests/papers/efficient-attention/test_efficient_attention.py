"""efficient-attention: a product of two normalised maps, through a middle whose size does not grow."""

from __future__ import annotations

import pytest
import torch

import attlas


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_efficient_attention_is_the_product_of_two_normalised_maps(kv_heads: int) -> None:
    layer = attlas.make("efficient-attention", dim=16, heads=2, kv_heads=kv_heads, value_dim=5).double()
    x = torch.randn(2, 12, 16).double()
    q, k, v = layer.project(layer.prepare(x)[-1])
    weights = q.softmax(-1) @ k.softmax(2).mT
    torch.testing.assert_close(layer.weights(x), weights.expand(-1, 2, -1, -1))
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    heads = (weights @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.o_proj(heads))


def test_efficient_attention_knows_no_order() -> None:
    layer = attlas.make("efficient-attention", dim=16, heads=2).double()
    x, order = torch.randn(1, 12, 16).double(), torch.randperm(12)
    torch.testing.assert_close(layer(x)[:, order], layer(x[:, order]))


def test_efficient_attention_names_wrong_options() -> None:
    with pytest.raises(ValueError, match="value_dim"):
        attlas.make("efficient-attention", dim=16, heads=2, value_dim=0)
