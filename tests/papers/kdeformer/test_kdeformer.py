"""kdeformer: unbiased above and below the line, with an error that falls like 1/√m."""

from __future__ import annotations

import pytest
import torch

import attlas
from attlas.bases.approximation import Draws
from attlas.layers.linear.kdeformer import KDEformer


class Enumerated(KDEformer):
    """Draws one key, the one it is told."""

    rank: int

    def draw(self, k, chances, rng) -> Draws:
        p = chances + 1 / k.shape[2]
        self.p = (p / p.sum(-1, keepdim=True))[..., self.rank]
        ranks = torch.full((*k.shape[:2], 1), self.rank)
        return Draws(ranks, -self.p.log()[..., None])


def _layer(kind=KDEformer, **options) -> KDEformer:
    torch.manual_seed(0)
    return kind(16, 2, **{"block": 8, "samples": 16, **options}).double()


def test_kdeformer_is_unbiased_above_and_below_the_line() -> None:
    layer = _layer(Enumerated, samples=1)
    x = torch.randn(2, 27, 16).double()
    q, k, v, inputs = layer.prepare(x)
    shares = layer.chances(q, inputs)
    below = above = 0.0
    for layer.rank in range(27):
        out, lse = layer.estimate(q, k, v, shares)
        weight = layer.p[..., None] * lse.exp()
        below, above = below + weight, above + weight[..., None] * out
    scores = (q @ k.transpose(-1, -2) * layer.scale).exp()
    torch.testing.assert_close(below, scores.sum(-1))
    torch.testing.assert_close(above, scores @ v)


def test_kdeformer_errs_like_one_over_the_root_of_the_samples() -> None:
    torch.manual_seed(1)
    x = torch.randn(4, 96, 16).double()
    errors = []
    for samples in (64, 256, 1024):
        each = [_layer(samples=samples, seed=seed).error(x, norm=2) for seed in range(8)]
        errors.append(float(torch.stack(each).mean()))
    assert errors[1] / errors[0] == pytest.approx(0.5, rel=0.25)
    assert errors[2] / errors[1] == pytest.approx(0.5, rel=0.25)


def test_kdeformer_draws_large_values_more_often() -> None:
    layer = _layer(samples=4000)
    k, shares = torch.randn(1, 2, 32, 8).double(), torch.ones(1, 2, 32).double()
    shares[..., 5] = 9.0
    rng = torch.Generator().manual_seed(0)
    ranks = layer.draw(k, shares, rng).ranks
    expected = (9 + 1 / 32) / (31 + 9 + 1)
    assert float((ranks == 5).double().mean()) == pytest.approx(expected, rel=0.1)


def test_kdeformer_refuses_a_causal_mask() -> None:
    with pytest.raises(ValueError, match="mask"):
        _layer()(torch.randn(1, 9, 16).double(), mask=attlas.masks.causal)
