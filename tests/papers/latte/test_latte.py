"""latte: tokens meet in latent variables; steps, chunks and all pairs at once are one function."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attlas
from attlas import masks


def _layer(loud: float = 1.0, **options):
    torch.manual_seed(0)
    layer = attlas.make("latte", **{"dim": 16, "heads": 2, "latents": 3, **options}).double().eval()
    with torch.no_grad():
        layer.k_proj.weight *= loud
        layer.q_proj.weight *= loud
    return layer


@pytest.mark.parametrize("loud", [1.0, 300.0])
@pytest.mark.parametrize("causal", [False, True])
def test_latte_forms_agree_even_where_exponentials_would_overflow(
    causal: bool, loud: float
) -> None:
    layer, x = _layer(loud, causal=causal), torch.randn(2, 70, 16).double()
    q, k, v, inputs = layer.prepare(x)
    assert (k.abs().max() > 750) == (loud > 1)  # e^750 is no float64
    dense = layer.output(layer.aggregate(layer.weigh(q, k, inputs), v, inputs), inputs)
    torch.testing.assert_close(layer(x), dense, atol=1e-5, rtol=0)
    if causal:
        cache = layer.init_cache()
        steps = [layer(token, cache=cache) for token in x.split(1, dim=1)]
        torch.testing.assert_close(torch.cat(steps, dim=1), dense, atol=1e-5, rtol=0)


def test_latte_is_the_sum_over_latents_of_two_distributions() -> None:
    layer, x = _layer(causal=True), torch.randn(1, 6, 16).double()
    q, k, v, inputs = layer.prepare(x)
    wanted = torch.zeros(1, 2, 6, 8).double()
    for head in range(2):
        for t in range(6):
            for latent in range(3):
                asked = q[0, head, t].softmax(-1)[latent]
                seen = k[0, head, : t + 1, latent].softmax(-1)
                wanted[0, head, t] += asked * (seen @ v[0, head, : t + 1])
    torch.testing.assert_close(layer(x), layer.output(wanted, inputs))


@pytest.mark.parametrize("pattern", [None, masks.causal, masks.window(3)])
def test_latte_weights_are_distributions_over_what_is_seen(pattern) -> None:
    layer, x = _layer(mask=pattern), torch.randn(2, 9, 16).double()
    weights = layer.weights(x)
    seen = torch.ones(9, 9, dtype=torch.bool) if pattern is None else masks.dense(pattern, 9, 9)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 9).double())
    assert bool((weights >= 0).all())
    assert bool(((weights == 0) == ~seen).all())
    q, k, v, inputs = layer.prepare(x)
    torch.testing.assert_close(layer.attend(q, k, v, inputs), weights @ v)


def test_latte_keeps_a_state_that_is_its_latents_means() -> None:
    """Behind the last token the state holds Σ_s p(s | l) v_s for every latent."""
    layer, x = _layer(causal=True), torch.randn(2, 40, 16).double()
    cache = layer.init_cache()
    layer(x, cache=cache)
    _, k, v, *_ = layer.prepare(x)
    states = cache.layers[0].states
    torch.testing.assert_close(states["state"], k.softmax(2).mT @ v)
    torch.testing.assert_close(states["total"], k.logsumexp(2, keepdim=True))
    assert [states[name].shape for name in ("state", "total")] == [(2, 2, 3, 8), (2, 2, 1, 3)]


def test_latte_with_one_latent_asks_nothing_of_the_query() -> None:
    layer, x = _layer(latents=1, causal=True), torch.randn(1, 9, 16).double()
    before = layer(x)
    with torch.no_grad():
        layer.q_proj.weight.normal_()
    torch.testing.assert_close(layer(x), before)
    weights = layer.weights(x)
    expected = layer.prepare(x)[1][..., 0].softmax(-1)
    torch.testing.assert_close(weights[:, :, -1], expected)


def test_latte_doubles_its_work_when_n_doubles_training_with_dropout_too() -> None:
    layer, work = attlas.make("latte", dim=32, heads=2, causal=True, dropout=0.5).train(), []
    for tokens in (256, 512):
        with FlopCounterMode(display=False) as count:
            layer(torch.randn(1, tokens, 32)).sum().backward()
        work.append(count.get_total_flops())
    # The first of the chunks has no state before it whose gradient would be asked for.
    assert work[1] == pytest.approx(2 * work[0], rel=0.02)


def test_latte_drops_latents_of_queries() -> None:
    layer, x = _layer(dropout=0.5, latents=1).train(), torch.randn(1, 200, 16).double()
    sums = layer.weights(x).sum(-1)
    kept = sums > 0
    torch.testing.assert_close(sums[kept], torch.full_like(sums[kept], 2.0))
    assert math.isclose(float(kept.double().mean()), 0.5, abs_tol=0.15)


def test_latte_refuses_what_it_cannot_honour() -> None:
    for position in ("rope", "alibi"):
        with pytest.raises(ValueError, match="position"):
            _layer(position=position)
    with pytest.raises(ValueError, match="latents"):
        _layer(latents=0)
    layer = _layer(causal=True)
    with pytest.raises(ValueError, match="cache"):
        layer(torch.randn(1, 4, 16).double(), mask=masks.window(2), cache=layer.init_cache())
