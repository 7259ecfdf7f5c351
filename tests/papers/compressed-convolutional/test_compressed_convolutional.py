"""compressed-convolutional: causal, in a latent as much narrower as it says, and so is its cache."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attlas

X = torch.randn(2, 11, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _layer(name: str = "cca", **options):
    torch.manual_seed(0)
    return attlas.make(name, **{"dim": 64, "heads": 4, "causal": True, **options}).double().eval()


@pytest.mark.parametrize("kernels", [(1, 1), (2, 2), (4, 3)])
def test_compressed_convolutional_is_causal_and_decodes(kernels: tuple[int, int]) -> None:
    layer = _layer(kernels=kernels, kv_heads=2, position="rope")
    changed = X.clone()
    changed[:, 6:] += 1
    torch.testing.assert_close(layer(changed)[:, :6], layer(X)[:, :6], atol=1e-12, rtol=0)
    assert (layer(changed)[:, 6:] - layer(X)[:, 6:]).abs().amax((0, 2)).min() > 1e-4
    cache = layer.init_cache()
    parts = [layer(part, cache=cache) for part in X.split([1, 4, 2, 1, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(X))


@pytest.mark.parametrize(("compression", "kv_heads"), [(2, 4), (2, 1), (4, 2)])
def test_compressed_convolutional_cache_and_flops_shrink(compression: int, kv_heads: int) -> None:
    """Scores and sums by C, the cache by C · heads / kv_heads; time is the benchmark's to measure."""
    flops, held = [], []
    for layer in (_layer(compression=compression, kv_heads=kv_heads), _layer("softmax")):
        q, k, v, inputs = layer.prepare(X)
        held.append(k.numel() + v.numel())
        with FlopCounterMode(display=False) as counter:
            layer.aggregate(layer.weigh(q, k, inputs), v, inputs)
        flops.append(counter.get_total_flops())
    assert flops[0] * compression == flops[1]
    assert held[0] * compression * 4 == held[1] * kv_heads


def test_compressed_convolutional_lengths_are_roots_and_temperatures() -> None:
    layer = _layer(kv_heads=2, position="rope")
    with torch.no_grad():
        layer.temperature.copy_(torch.tensor([0.5, 2.0]))
    q, k, *_ = layer.prepare(X)
    torch.testing.assert_close(q.norm(dim=-1), torch.full_like(q[..., 0], 8**0.5))
    wanted = (layer.temperature * 8**0.5)[:, None].expand(2, 2, 11)
    torch.testing.assert_close(k.norm(dim=-1), wanted)


def test_compressed_convolutional_values_are_of_this_token_and_the_one_before() -> None:
    layer = _layer(kv_heads=2, bias=True)
    v = layer.prepare(X)[2]
    torch.testing.assert_close(v[:, 0], layer.v_current(X))
    before = torch.cat((torch.zeros_like(X[:, :1]), X[:, :-1]), dim=1)
    torch.testing.assert_close(v[:, 1], layer.v_delayed(before))


def test_compressed_convolutional_without_convolutions_keeps_the_means() -> None:
    layer = _layer(kv_heads=2)
    with torch.no_grad():
        for parameter in (*layer.conv_channels.parameters(), *layer.conv_heads.parameters()):
            parameter.zero_()
    q, k, _ = layer.project(layer.prepare(X)[-1])
    theirs = layer.q_proj(X).view(2, 11, 2, 2, 8)
    keys = layer.k_proj(X).view(2, 11, 2, 1, 8)
    mean = (theirs + keys) / 2
    torch.testing.assert_close(q, mean.flatten(2, 3).transpose(1, 2))
    torch.testing.assert_close(k, mean.mean(3).transpose(1, 2))


def test_compressed_convolutional_refuses_what_does_not_fit() -> None:
    for options in ({"compression": 0}, {"kernels": (0, 2)}, {"heads": 5}):
        with pytest.raises((ValueError, TypeError), match=next(iter(options))):
            _layer(**options)
