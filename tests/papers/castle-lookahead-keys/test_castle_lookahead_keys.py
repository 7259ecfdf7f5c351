"""castle-lookahead-keys: keys that grow are the definition's, in blocks, at once and step by step."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import silu

import attlas
from attlas.layers.heads import castle_lookahead_keys as module


def _layer(**options):
    options = {"dim": 32, "heads": 4, "causal": True, **options}
    return attlas.make("castle-lookahead-keys", **options).double()


def _by_definition(layer, x: torch.Tensor) -> torch.Tensor:
    """Weights with the keys u_s^t of every token made anew for every t."""
    def heads(y):
        return y.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)

    q, k = heads(layer.q_proj(x)), heads(layer.k_proj(x))
    asking, k_new, v_new = (heads(part) for part in layer.ahead_proj(x).chunk(3, dim=-1))
    repeats = layer.heads // layer.kv_heads
    weights = torch.zeros(*q.shape[:3], x.shape[1], dtype=x.dtype)
    for t in range(x.shape[1]):
        keys = []
        for s in range(t + 1):
            last = t if layer.window is None else min(t, s + layer.window)
            later = slice(s + 1, last + 1)
            share = torch.sigmoid(k_new[:, :, later] @ asking[:, :, s, :, None] * layer.scale)
            keys.append((share * v_new[:, :, later]).sum(2))
        u = torch.stack(keys, dim=2).repeat_interleave(repeats, dim=1)
        now = layer.scale * q[:, :, t, :, None]
        plain = k[:, :, : t + 1].repeat_interleave(repeats, dim=1) @ now
        weights[:, :, t, : t + 1] = (plain - silu(u @ now)).squeeze(-1).softmax(-1)
    return weights


@pytest.mark.parametrize("block", [1, 3, 128])
@pytest.mark.parametrize("options", [{}, {"window": 4}, {"window": 1, "kv_heads": 2}])
def test_castle_lookahead_keys_are_the_definition(monkeypatch, block: int, options) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    layer = _layer(**options)
    x = 2 * torch.randn(2, 11, 32, dtype=torch.float64)
    torch.testing.assert_close(layer.weights(x), _by_definition(layer, x))


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"kv_heads": 2}, {"position": "rope"}])
def test_castle_lookahead_keys_token_by_token_is_all_at_once(options) -> None:
    layer = attlas.make("castle", dim=32, heads=4, causal=True, **options)
    x = torch.randn(2, 23, 32)
    cache = layer.init_cache()
    steps = torch.cat([layer(token, cache=cache) for token in x.split(1, dim=1)], dim=1)
    torch.testing.assert_close(steps, layer(x), atol=1e-5, rtol=0)
    held = cache.layers[0]
    kept = held.keys.numel() + held.values.numel() + held.states["lookahead"].numel()
    assert kept == 2 * 23 * 4 * layer.kv_heads * layer.head_dim  # k, q̃, v and u


def test_castle_lookahead_keys_of_the_future_change_nothing() -> None:
    layer = _layer(position="rope")
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    changed = x.clone()
    changed[:, 9:] = torch.randn_like(x[:, 9:])
    torch.testing.assert_close(layer(changed)[:, :9], layer(x)[:, :9], atol=1e-12, rtol=0)
    assert not torch.allclose(layer(changed)[:, 9:], layer(x)[:, 9:])


def test_castle_lookahead_keys_without_values_is_softmax_attention() -> None:
    layer, plain = _layer(), attlas.Attention(32, 4, causal=True).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    assert (layer(x) - plain(x)).abs().max() > 1e-3
    with torch.no_grad():
        layer.ahead_proj.weight[64:].zero_()
    torch.testing.assert_close(layer(x), plain(x), atol=1e-6, rtol=0)


def test_castle_lookahead_keys_gradients_are_the_same_in_blocks_that_are_computed_again(
    monkeypatch,
) -> None:
    layer = _layer(window=5)
    x = torch.randn(2, 12, 32, dtype=torch.float64, requires_grad=True)
    gradients = []
    for block in (128, 5):
        monkeypatch.setattr(module, "BLOCK", block)
        loss = layer(x).square().sum()
        gradients.append(torch.autograd.grad(loss, (x, *layer.parameters())))
    for whole, blocks in zip(*gradients, strict=True):
        torch.testing.assert_close(blocks, whole)


def test_castle_lookahead_keys_learn_only_inside_the_window() -> None:
    layer = _layer(window=2)
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    keys = []
    for tokens in (x[:, :4], x):
        cache = layer.init_cache()
        layer(tokens, cache=cache)
        keys.append(cache.layers[0].states["lookahead"][..., :4, :])
    moved = (keys[0] - keys[1]).abs().amax((0, 1, 2, 4)) > 1e-9
    assert moved.tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match="window"):
        _layer(window=0)
