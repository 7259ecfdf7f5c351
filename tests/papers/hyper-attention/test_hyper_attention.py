"""hyper-attention: exact where blocks cover the sequence, and nearer to it as blocks and samples grow."""

from __future__ import annotations

import pytest
import torch

import attlas
from attlas.layers.linear.hyper import HyperAttention


def _layer(**options) -> HyperAttention:
    torch.manual_seed(0)
    sizes = {"dim": 16, "heads": 2, "block": 8, "samples": 8, "min_length": 8, **options}
    return attlas.make("hyper-attention", **sizes).double()


def _clustered(tokens: int = 128) -> torch.Tensor:
    torch.manual_seed(1)
    centres = 3 * torch.randn(8, 16)
    return (centres[torch.randint(8, (2, tokens))] + 0.3 * torch.randn(2, tokens, 16)).double()


@pytest.mark.parametrize("causal", [False, True])
def test_hyper_attention_is_exact_with_blocks_that_cover_the_sequence(causal: bool) -> None:
    error = _layer(block=128, causal=causal).error(_clustered())
    assert error.max() < 1e-6
    assert _layer(causal=causal).error(_clustered()).min() > 1e-3


def test_hyper_attention_errs_less_with_larger_blocks_and_more_samples() -> None:
    def error(**options: int) -> float:
        # Of eight draws each, so that one lucky draw tells nothing.
        each = [_layer(seed=seed, **options).error(_clustered()) for seed in range(8)]
        return float(torch.stack(each).mean())

    blocks = [error(block=size) for size in (4, 16, 64)]
    samples = [error(samples=count) for count in (4, 32, 256)]
    assert blocks == sorted(blocks, reverse=True)
    assert samples == sorted(samples, reverse=True)
    assert blocks[-1] < blocks[0] / 1.5
    assert samples[-1] < samples[0] / 2


@pytest.mark.parametrize("tokens", [31, 32, 45])
def test_hyper_attention_weighs_no_later_key(tokens: int) -> None:
    layer = _layer(causal=True, block=4, samples=3, min_length=4)
    weights = layer.weights(_clustered(tokens))
    assert weights.triu(1).abs().max() == 0
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_hyper_attention_counts_no_key_of_a_querys_block_twice() -> None:
    layer, x = _layer(samples=400), _clustered(32)
    q, k, *_ = layer.prepare(x)
    counts = layer.counts(q, k)
    own = counts == 1.0  # draws count in steps of 32/400, which is no part of 1
    assert (own.sum(-1) == 8).all()
    steps = counts[~own] * 400 / 32
    torch.testing.assert_close(steps, steps.round())
    # Blocks have 8 queries, too, and all of one block miss the same draws.
    assert (own.sum(-2) == 8).all()


def test_hyper_attention_follows_its_seed_alone() -> None:
    x = _clustered(64)
    first, other = _layer(seed=1), _layer(seed=2)
    other.load_state_dict(first.state_dict())
    again = _layer(seed=1)
    again.load_state_dict(first.state_dict())
    torch.manual_seed(5)
    assert torch.equal(first(x), again(x))
    assert (first(x) - other(x)).abs().max() > 1e-4


def test_hyper_attention_refuses_what_it_cannot_do() -> None:
    for name in ("block", "samples", "projections", "min_length"):
        with pytest.raises(ValueError, match=name):
            _layer(**{name: 0})
    with pytest.raises(ValueError, match="position"):
        _layer(position="alibi")
