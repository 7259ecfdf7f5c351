"""super-attention and its two thinner forms: what they equal, what they weigh, what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attlas

FORMS = ("optimised-attention", "efficient-qk-attention", "super-attention")
X = torch.randn(2, 11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _layer(name: str, **options):
    if name == "super-attention":
        options = {"length": 16, **options}
    return attlas.make(name, dim=32, heads=4, **options).double().eval()


def _weights(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", FORMS[:2])
def test_super_attention_thin_forms_are_softmax_with_identities(name: str, causal: bool) -> None:
    layer = _layer(name, causal=causal)
    plain = attlas.make("softmax", dim=32, heads=4, causal=causal).double()
    missing, _ = plain.load_state_dict(layer.state_dict(), strict=False)
    assert set(missing) == {"v_proj.weight", *(["k_proj.weight"] if "eff" in name else [])}
    with torch.no_grad():
        for projection in missing:
            plain.get_parameter(projection).copy_(torch.eye(32))
    torch.testing.assert_close(layer(X), plain(X), atol=1e-6, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_super_attention_without_mixing_is_efficient(causal: bool) -> None:
    layer, thin = _layer(FORMS[2], causal=causal), _layer(FORMS[1], causal=causal)
    thin.load_state_dict(layer.state_dict(), strict=False)
    assert (layer(X) - thin(X)).abs().max() > 1e-3
    with torch.no_grad():
        layer.kernel.weight.copy_(torch.eye(16))
    torch.testing.assert_close(layer(X), thin(X), atol=1e-6, rtol=0)


def test_super_attention_parameters() -> None:
    """3/4 and 1/2 of the plain layer's; the kernel comes on top."""
    plain = _weights(_layer("softmax"))
    assert [_weights(_layer(n)) / plain for n in FORMS] == [0.75, 0.5, 0.5 + 16**2 / plain]


def test_super_attention_mixes_values_by_the_leading_block() -> None:
    layer = _layer(FORMS[2])
    _, k, v, *_ = layer.prepare(X)
    mixed = layer.kernel.weight[:11, :11] @ X
    torch.testing.assert_close(v.transpose(1, 2).flatten(2), mixed)
    torch.testing.assert_close(k.transpose(1, 2).flatten(2), X)
    causal = _layer(FORMS[2], causal=True)
    _, _, v, *_ = causal.prepare(X)
    torch.testing.assert_close(
        v.transpose(1, 2).flatten(2), causal.kernel.weight[:11, :11].tril() @ X
    )


def test_super_attention_refuses_what_it_has_no_place_for() -> None:
    layer = _layer(FORMS[2], length=10, causal=True)
    with pytest.raises(ValueError, match="length"):
        layer(X)
    cache = layer.init_cache()
    layer(X[:, :10], cache=cache)
    with pytest.raises(ValueError, match="length"):
        layer(X[:, 10:], cache=cache)
    for name in FORMS:
        for options in ({"kv_heads": 2}, {"head_dim": 4}):
            with pytest.raises(ValueError, match=next(iter(options))):
                _layer(name, **options)
    with pytest.raises(ValueError, match="length"):
        _layer(FORMS[2], length=0)
