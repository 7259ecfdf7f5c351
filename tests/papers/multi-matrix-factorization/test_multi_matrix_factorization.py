"""multi-matrix-factorization: multi-query attention with factored queries, and values from keys."""

from __future__ import annotations

import pytest
import torch

import attlas

X = torch.randn(2, 11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _layer(name: str, **options):
    torch.manual_seed(0)
    made = attlas.make(name, **{"dim": 32, "heads": 4, "head_dim": 12, "causal": True, **options})
    return made.double().eval()


@pytest.mark.parametrize("options", [{}, {"query_rank": 5}, {"position": "rope"}])
def test_multi_matrix_factorization_is_multi_query_with_the_product(options) -> None:
    layer = _layer("mfa", **options)
    plain = _layer("mqa", **{k: v for k, v in options.items() if k != "query_rank"})
    state = layer.state_dict()
    state["q_proj.weight"] = state.pop("q_up.weight") @ state.pop("q_down.weight")
    plain.load_state_dict(state)
    torch.testing.assert_close(layer(X), plain(X), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "numbers"), [("mfa", 2 * 12), ("mfa-kr", 12)])
def test_multi_matrix_factorization_caches_so_many_numbers_a_token(name: str, numbers: int) -> None:
    layer = _layer(name)
    cache = layer.init_cache()
    layer(X, cache=cache)
    held = cache.layers[0].keys.numel() + cache.layers[0].values.numel()
    assert held == numbers * 2 * 11


def test_multi_matrix_factorization_key_reuse_starts_as_weights_times_keys() -> None:
    layer = _layer("mfa-kr", position="rope")
    assert not layer.gate.any()
    heads = layer.attend(*layer.prepare(X))
    keys = layer.k_proj(X)[:, None]  # before they are turned
    torch.testing.assert_close(heads, layer.weights(X) @ keys)


def test_multi_matrix_factorization_key_reuse_is_a_value_projection() -> None:
    """W_V = W_K + α N W_K."""
    layer, plain = _layer("mfa-kr", position="rope"), _layer("mfa", position="rope")
    with torch.no_grad():
        layer.gate.normal_()
        state = layer.state_dict()
        gate, mix, keys = state.pop("gate"), state.pop("mix.weight"), state["k_proj.weight"]
        plain.load_state_dict({**state, "v_proj.weight": keys + gate[:, None] * (mix @ keys)})
        torch.testing.assert_close(layer(X), plain(X))


def test_multi_matrix_factorization_key_reuse_turns_cached_keys() -> None:
    layer = _layer("mfa-kr", position="rope")
    with torch.no_grad():
        layer.gate.normal_()
    cache = layer.init_cache()
    parts = [layer(part, cache=cache) for part in X.split([5, 3, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(X))
    torch.testing.assert_close(layer(X, positions=torch.arange(11) + 7), layer(X))
    assert (layer(X, positions=2 * torch.arange(11)) - layer(X)).abs().max() > 1e-4


def test_multi_matrix_factorization_refuses_grouped_keys() -> None:
    for options in ({"kv_heads": 2}, {"query_rank": 0}):
        with pytest.raises((ValueError, TypeError), match=next(iter(options))):
            _layer("mfa", **options)
