"""linformer: attention to mixtures of all tokens, through a middle whose size does not grow."""

from __future__ import annotations

import pytest
import torch

import attlas
from attlas.layers.linear.linformer import Projection


@pytest.mark.parametrize("options", [{}, {"per_head": True}, {"share_kv": True}, {"kv_heads": 1}])
def test_linformer_attends_to_mixtures_of_all_tokens(options: dict[str, object]) -> None:
    layer = attlas.make("linformer", dim=16, heads=2, rank=4, max_length=20, **options).double()
    x = torch.randn(2, 12, 16).double()
    q, k, v = layer.project(layer.prepare(x)[-1])
    matrices = (layer.projection.keys, layer.projection.values)
    mixed = [m[:, :, :12] @ each for m, each in zip(matrices, (k, v), strict=True)]
    heads = (q @ mixed[0].mT / 8**0.5).softmax(-1) @ mixed[1]
    torch.testing.assert_close(layer(x), layer.o_proj(heads.transpose(1, 2).flatten(2)))


def test_linformer_shares_one_projection_between_keys_and_values_and_between_layers() -> None:
    first = attlas.make("linformer", dim=16, heads=2, rank=4, max_length=20, share_kv=True)
    second = attlas.make("linformer", dim=16, heads=2, projection=first.projection)
    assert first.projection.values is first.projection.keys
    second(first(torch.randn(1, 9, 16))).sum().backward()
    assert len(dict(first.named_parameters())) == 5
    assert second.projection.keys.grad is first.projection.keys.grad
    assert not first.projection.keys.grad[..., 9:].any()  # of positions that no token had


def test_linformer_has_one_matrix_a_head_where_asked() -> None:
    layer = attlas.make("linformer", dim=16, heads=4, kv_heads=2, rank=4, max_length=20, per_head=True)
    assert layer.projection.keys.shape == (2, 4, 20)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rank": 0}, "rank"), ({"max_length": 0}, "max_length"), ({"position": "alibi"}, "position"),
        ({"projection": Projection(20, 4, heads=3)}, "projection"), ({"causal": True}, "causal"),
    ],
)  # fmt: skip
def test_linformer_names_wrong_options(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        attlas.make("linformer", dim=16, heads=4, kv_heads=2, **options)


def test_linformer_refuses_more_tokens_than_it_has_columns_for() -> None:
    layer = attlas.make("linformer", dim=16, heads=2, rank=4, max_length=8)
    with pytest.raises(ValueError, match="max_length=8"):
        layer(torch.randn(1, 9, 16))
