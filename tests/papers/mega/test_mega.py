"""Mega: the moving average by FFT and by steps, relu² and Laplace, chunks."""

from __future__ import annotations

import pytest
import torch

import attlas
from attlas.bases.damped_ema import DampedEMA


def test_both_forms_of_the_average_agree() -> None:
    ema = DampedEMA(6, 4).double()
    x = torch.randn(2, 300, 6, dtype=torch.float64)
    state = torch.randn(2, 6, 4, dtype=torch.float64)
    valid = torch.rand(2, 300) > 0.3
    valid[:, -1] = True
    for given in (None, valid):
        by_fft, by_steps = (ema(x, given, state, form=form) for form in ("fft", "step"))
        kept = slice(None) if given is None else given
        assert torch.allclose(by_fft[0][kept].flatten(), by_steps[0][kept].flatten(), atol=1e-9)
        assert torch.allclose(by_fft[1], by_steps[1], atol=1e-9)


def test_the_average_in_parts_is_the_average() -> None:
    ema = DampedEMA(5, 3)
    x = torch.randn(1, 40, 5)
    whole, last = ema(x)
    first, state = ema(x[:, :17])
    second, end = ema(x[:, 17:], state=state)
    assert torch.allclose(whole, torch.cat((first, second), dim=1), atol=1e-5)
    assert torch.allclose(last, end, atol=1e-5)


def test_laplace_is_a_smooth_squared_relu() -> None:
    """Near it around √½, where it is 0.5 and relu² too, and bounded by 0 and 1."""
    layers = [attlas.make("mega", dim=16, heads=1, weights_by=how) for how in ("laplace", "relu2")]
    scores = torch.linspace(0.6, 0.8, 9)
    inputs = layers[0].prepare(torch.zeros(1, 9, 16))[-1]
    laplace, relu2 = (layer.normalize(scores, inputs) for layer in layers)
    assert (laplace - relu2).abs().max() < 0.05
    extremes = layers[0].normalize(torch.tensor([-9.0, 9.0]), inputs)
    assert extremes.tolist() == pytest.approx([0.0, 1.0])


def test_one_chunk_of_everything_is_mega() -> None:
    torch.manual_seed(0)
    whole = attlas.make("mega", dim=16, heads=1, causal=True, max_positions=32).eval()
    chunked = attlas.make("mega-chunk", dim=16, heads=1, causal=True, chunk=32).eval()
    chunked.load_state_dict(whole.state_dict())
    x = torch.randn(2, 30, 16)
    assert torch.allclose(whole(x), chunked(x), atol=1e-5)


def test_only_the_average_crosses_chunks() -> None:
    layer = attlas.make("mega-chunk", dim=16, heads=1, causal=True, chunk=4).eval()
    weights = layer.weights(torch.randn(1, 12, 16))[0, 0]
    blocks = torch.arange(12) // 4
    assert not weights[blocks[:, None] != blocks].any()
    x = torch.randn(1, 12, 16, requires_grad=True)
    layer(x)[0, 8].sum().backward()
    assert x.grad[0, :8].abs().sum() > 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="heads must be 1, got 2"):
        attlas.make("mega", dim=16, heads=2)
    with pytest.raises(ValueError, match="head_dim must be even for relative='rotary', got 5"):
        attlas.make("mega", dim=16, heads=1, head_dim=5, relative="rotary")
