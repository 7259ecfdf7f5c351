"""head-embedding-mha: few parameters, heads that are one head's variants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attlas

X = torch.randn(2, 11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
MODES = ("multiplicative", "additive")


def _layer(mode: str = "multiplicative", **options):
    return attlas.make("head-embedding-mha", dim=32, heads=4, mode=mode, **options).double().eval()


def _parameters(layer: nn.Module) -> int:
    """Without the output's, which has as many inputs as there are heads whatever makes them."""
    return sum(p.numel() for name, p in layer.named_parameters() if not name.startswith("o_proj"))


@pytest.mark.parametrize("mode", MODES)
def test_head_embedding_mha_adds_3nd_parameters_to_a_single_head(mode: str) -> None:
    """n = 4 heads of d = 8: 3·4·8 numbers; single matrices for each head would be (3n − 3)·d·dim."""
    single = attlas.make("softmax", dim=32, heads=1, head_dim=8)
    assert _parameters(_layer(mode)) - _parameters(single) == 3 * 4 * 8
    many = attlas.make("softmax", dim=32, heads=4)
    assert _parameters(many) - _parameters(single) == (3 * 4 - 3) * 8 * 32


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("causal", [False, True])
def test_head_embedding_mha_without_embeddings_is_the_single_head(mode: str, causal: bool) -> None:
    layer = _layer(mode, causal=causal)
    single = attlas.make("softmax", dim=32, heads=1, head_dim=8, causal=causal).double()
    with torch.no_grad():
        for name in ("q", "k", "v"):
            getattr(layer, f"{name}_embed").zero_()
            getattr(single, f"{name}_proj").weight.copy_(getattr(layer, f"{name}_proj").weight)
    heads, one = (made.attend(*made.prepare(X)) for made in (layer, single))
    torch.testing.assert_close(heads, one.expand(2, 4, 11, 8), atol=1e-6, rtol=0)


def test_head_embedding_mha_by_hand() -> None:
    """Head 2 of both forms, from the equations."""
    for mode in MODES:
        layer = _layer(mode, bias=True)
        with torch.no_grad():
            for name in ("q", "k", "v"):
                getattr(layer, f"{name}_embed").normal_()

        def stream(name: str, layer: nn.Module = layer, mode: str = mode) -> Tensor:
            shared, e = getattr(layer, f"{name}_proj")(X), getattr(layer, f"{name}_embed")[2]
            return shared + e if mode == "additive" else shared * (1 + e)

        weights = (stream("q") @ stream("k").mT / 8**0.5).softmax(-1)
        torch.testing.assert_close(layer.attend(*layer.prepare(X))[:, 2], weights @ stream("v"))


def test_head_embedding_mha_additive_keys_need_rotations_to_matter() -> None:
    for position, felt in ((None, False), ("rope", True)):
        layer = _layer("additive", position=position)
        before = layer(X)
        with torch.no_grad():
            layer.k_embed.normal_()
        assert bool((layer(X) - before).abs().max() > 1e-6) == felt


def test_head_embedding_mha_refuses_another_mode() -> None:
    with pytest.raises((ValueError, TypeError), match="mode"):
        _layer("divided")
