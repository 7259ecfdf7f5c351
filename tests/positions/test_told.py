"""Positions that a call or its padding tells: distances are theirs."""

from __future__ import annotations

import pytest
import torch

import attlas


@pytest.mark.parametrize(("causal", "used"), [(True, 32), (False, 31)])
def test_t5_has_the_past_alone_where_the_layer_has(causal: bool, used: int) -> None:
    layer = attlas.make("softmax", dim=16, heads=2, causal=causal, position="t5")
    reach = torch.arange(-2000, 1 if causal else 2001)
    assert len(layer.position_encoding.bucket(reach).unique()) == used
    assert layer.position_encoding.bidirectional is not causal


@pytest.mark.parametrize("name", ["alibi", "t5"])
@pytest.mark.parametrize("route", ["forward", "weights"])
def test_distances_are_those_of_the_positions_told(name: str, route: str) -> None:
    torch.manual_seed(0)
    layer = attlas.make("softmax", dim=16, heads=2, position=name).double().eval()
    x, at = (
        torch.randn(2, 7, 16, dtype=torch.float64),
        torch.tensor([[0, 2, 3, 4, 9, 40, 41], [0, 1, 2, 3, 4, 5, 6]]),
    )
    q, k, v = (
        p(x).unflatten(-1, (2, 8)).transpose(1, 2)
        for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    far = at[:, None, None, :] - at[:, None, :, None]
    heads = torch.arange(2)[:, None, None]
    encoding = layer.position_encoding
    bias = (
        -encoding.slopes[heads] * far.abs()
        if name == "alibi"
        else encoding.weight[encoding.bucket(far), heads]
    )
    weights = (q @ k.mT / 8**0.5 + bias).softmax(-1)
    wanted = (
        weights if route == "weights" else layer.o_proj((weights @ v).transpose(1, 2).flatten(2))
    )
    found = layer.weights(x, positions=at) if route == "weights" else layer(x, positions=at)
    torch.testing.assert_close(found, wanted)
    rows = [
        (layer.weights if route == "weights" else layer)(x[i : i + 1], positions=at[i])
        for i in range(2)
    ]
    torch.testing.assert_close(torch.cat(rows), wanted)


def test_a_cache_remembers_the_positions_that_were_told() -> None:
    torch.manual_seed(0)
    layer = attlas.make("softmax", dim=16, heads=2, position="t5", causal=True).double().eval()
    x, at = (
        torch.randn(1, 9, 16, dtype=torch.float64),
        torch.tensor([0, 1, 2, 3, 20, 21, 22, 60, 61]),
    )
    cache = layer.init_cache()
    parts = [
        layer(x[:, s:e], positions=at[s:e], cache=cache)
        for s, e in ((0, 3), (3, 5), (5, 6), (6, 9))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x, positions=at))


def test_a_window_counts_tokens_and_no_padding_between_them() -> None:
    torch.manual_seed(0)
    layer = attlas.make("softmax", dim=16, heads=2, mask=attlas.masks.window(2)).double().eval()
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    valid = torch.tensor([[True, False, True, True, False, False, True, True]])
    wide = torch.randn(1, 8, 16, dtype=torch.float64)
    wide[valid] = x[0]
    torch.testing.assert_close(layer(wide, mask=valid)[valid], layer(x)[0])
