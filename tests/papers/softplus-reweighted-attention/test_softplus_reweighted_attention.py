"""softplus-reweighted-attention: exp is softmax, rows sum to 1 in both stages, longer texts are read."""

from __future__ import annotations

import math

import pytest
import torch

import attlas
from attlas import Attention, masks
from tiny_language import held_out, train

PATTERNS = {
    "none": None, "causal": masks.causal, "window": masks.window(4),
    "each head": masks.per_head(masks.causal, masks.window(5), masks.full, masks.causal),
}  # fmt: skip


def _layer(name: str = "softplus-reweighted-attention", **options):
    return attlas.make(name, **{"dim": 32, "heads": 4, **options}).double()


@pytest.mark.parametrize("causal", [False, True])
def test_softplus_reweighted_attention_with_exp_and_unit_scale_is_softmax(causal: bool) -> None:
    layer = _layer("lssa", activation="exp", scaled=False, causal=causal, position="rope")
    plain = Attention(32, 4, causal=causal, position="rope").double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-6, rtol=0)
    torch.testing.assert_close(layer.weights(x), plain.weights(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", ["lssa", "lssar"])
def test_softplus_reweighted_attention_rows_sum_to_one(name: str, pattern: str) -> None:
    layer = _layer(name, mask=PATTERNS[pattern])
    sums = layer.weights(torch.randn(2, 11, 32, dtype=torch.float64)).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-6, rtol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("position", [None, "rope"])
def test_softplus_reweighted_attention_is_the_two_equations(pattern: str, position) -> None:
    mask = PATTERNS[pattern]
    first, second = (_layer(n, mask=mask, position=position) for n in ("lssa", "lssar"))
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    q, k, v, _ = first.prepare(x)
    seen = torch.ones(1, 1, 11, 11, dtype=torch.bool)
    if mask is not None:
        seen = masks.dense(mask, 11, 11)
    n = seen.sum(-1, keepdim=True).double()
    cosines = q / q.norm(dim=-1, keepdim=True) @ (k / k.norm(dim=-1, keepdim=True)).mT
    positive = (1 + (math.log(8) * n.log() * cosines).exp()).log() * seen
    a = positive / positive.sum(-1, keepdim=True)
    torch.testing.assert_close(first.weights(x), a)
    torch.testing.assert_close(first.attend(*first.prepare(x)), a @ v)
    above = (n * a - (n > 3).double()).clamp(min=0) ** 15
    torch.testing.assert_close(second.weights(x), above / above.sum(-1, keepdim=True))


def test_softplus_reweighted_attention_keeps_only_weights_above_average() -> None:
    first, second = (_layer(n, causal=True) for n in ("lssa", "lssar"))
    second.load_state_dict(first.state_dict())
    x = torch.randn(1, 33, 32, dtype=torch.float64)
    a, sharp = first.weights(x), second.weights(x)
    average = 1 / torch.arange(1, 34).double()[:, None]
    assert ((sharp > 0) == (a > average))[:, :, 3:].all()
    assert (sharp.amax(-1) >= a.amax(-1))[:, :, 3:].all()


def test_softplus_reweighted_attention_keeps_equal_weights() -> None:
    """No key is above the average of equal ones, and 0 / 0 is no answer."""
    layer = _layer(causal=True)
    scores = torch.zeros(1, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    inputs = layer.prepare(torch.randn(1, 5, 32).double())[-1]
    wanted = torch.ones(5, 5).tril() / torch.arange(1, 6)[:, None]
    torch.testing.assert_close(layer.normalize(scores, inputs)[0, 0], wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_softplus_reweighted_attention_far_below_zero_is_exp(dtype: torch.dtype) -> None:
    layer = _layer("lssa")
    score = torch.tensor([-200.0, -30.0, -14.0, 0.0, 30.0], dtype=dtype, requires_grad=True)
    index = torch.zeros((), dtype=torch.long)
    logs = layer.score_mod(score, index, index, index, index)
    wanted = torch.tensor([-200.0, -30.0, -14.0, math.log(math.log(2)), math.log(30.0)])
    torch.testing.assert_close(logs.float(), wanted, atol=0.02, rtol=0.01)
    logs.sum().backward()
    assert score.grad.isfinite().all()


def test_softplus_reweighted_attention_reads_texts_16_times_longer() -> None:
    """Its loss stays nearly constant; at this size softmax attention's does too, so none is compared."""
    model = train("lssar", position="rope", length=24, steps=120)
    short = held_out(model, length=24, batch=16)
    for times in (8, 16):
        assert held_out(model, length=24 * times, batch=16) < 1.1 * short


@pytest.mark.parametrize("option", [
    {"activation": "relu"}, {"power": 0}, {"spared": 0}, {"head_dim": 1},
])  # fmt: skip
def test_softplus_reweighted_attention_refuses(option) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(option))):
        _layer(**option)
