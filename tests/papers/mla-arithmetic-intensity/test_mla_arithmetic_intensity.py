"""mla-arithmetic-intensity: the absorbed form is the expanded one, from a cache of one latent a token."""

from __future__ import annotations

import pytest
import torch

import attlas

X = torch.randn(2, 11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FORMS = ({}, {"query_latent": 12}, {"value_dim": 5}, {"latent": 7, "rotary": 6, "bias": True})


def _layer(**options):
    torch.manual_seed(0)
    return attlas.make("mla", dim=32, heads=4, **{"causal": True, **options}).double().eval()


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("queries", [1, 3, 11])
def test_mla_arithmetic_intensity_absorbed_is_expanded(
    options: dict[str, int], queries: int
) -> None:
    layer = _layer(**options)
    q, k, v, inputs = layer.prepare(X)
    q = q[:, :, -queries:]
    expanded = layer.expanded(q, k, v, inputs)
    absorbed = layer.aggregate(layer.weigh(q, k, inputs), v, inputs)
    assert absorbed.shape == (2, 4, queries, layer.value_dim)
    torch.testing.assert_close(absorbed, expanded, atol=1e-5, rtol=0)


def test_mla_arithmetic_intensity_decoding_takes_the_absorbed_form(monkeypatch) -> None:
    """A prompt expands the latents; a step, which has room for all its scores, does not."""
    layer, expansions = _layer(), []
    expanded = layer.expanded
    monkeypatch.setattr(layer, "expanded", lambda *a: expansions.append(len(a)) or expanded(*a))
    cache = layer.init_cache()
    parts = [layer(X[:, :8], cache=cache)]
    assert len(expansions) == 1
    parts += [layer(X[:, at : at + 1], cache=cache) for at in range(8, 11)]
    assert len(expansions) == 1
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(X), atol=1e-5, rtol=0)


def test_mla_arithmetic_intensity_caches_a_latent_and_a_rotary_key() -> None:
    layer = _layer(latent=7, rotary=6)
    cache = layer.init_cache()
    layer(X, cache=cache)
    assert cache.layers[0].keys.shape == (2, 1, 11, 7 + 6)
    assert cache.layers[0].values.numel() == 0


def test_mla_arithmetic_intensity_rotary_key_sees_distances_alone() -> None:
    layer = _layer()
    near = layer(X, positions=torch.arange(11))
    torch.testing.assert_close(layer(X, positions=torch.arange(11) + 5), near)
    assert (layer(X, positions=2 * torch.arange(11)) - near).abs().max() > 1e-4


def test_mla_arithmetic_intensity_refuses_what_it_cannot_honour() -> None:
    for options in ({"position": "rope"}, {"kv_heads": 2}, {"latent": 0}, {"value_dim": 0}):
        with pytest.raises((ValueError, TypeError), match=next(iter(options))):
            _layer(**options)
