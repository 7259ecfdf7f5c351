"""cog-attention: softmax where logits are positive; absolute rows sum to 1; signs are the logits'."""

from __future__ import annotations

import pytest
import torch

import attlas
from attlas import Attention, masks


def _layer(**options):
    return attlas.make("cog-attention", **{"dim": 32, "heads": 4, **options}).double()


@pytest.mark.parametrize("causal", [False, True])
def test_cog_attention_of_positive_logits_is_softmax(causal: bool) -> None:
    layer, plain = _layer(causal=causal), Attention(32, 4, causal=causal).double()
    with torch.no_grad():
        layer.q_proj.weight.abs_()
        layer.k_proj.weight.abs_()
    plain.load_state_dict(layer.state_dict())
    x = torch.rand(2, 11, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-6, rtol=0)
    torch.testing.assert_close(layer.weights(x), plain.weights(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("pattern", [None, masks.causal, masks.window(3)])
def test_cog_attention_absolute_rows_sum_to_one(pattern) -> None:
    layer, plain = _layer(mask=pattern), Attention(32, 4, mask=pattern).double()
    plain.load_state_dict(layer.state_dict())
    x = 3 * torch.randn(2, 11, 32, dtype=torch.float64)
    weights = layer.weights(x)
    sums = weights.abs().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-6, rtol=0)
    q, k, *_ = plain.prepare(x)
    p = (q @ k.mT * plain.scale).expand_as(weights)
    seen = torch.ones_like(p, dtype=torch.bool)
    if pattern is not None:
        seen = masks.dense(pattern, 11, 11).expand_as(p)
    assert torch.equal(weights.sign()[seen], p.sign()[seen])
    assert (weights < 0).any()
    assert (weights > 0).any()
    assert (weights[~seen] == 0).all()


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_cog_attention_in_two_softmaxes_is_the_definition(position: str, kv_heads: int) -> None:
    pattern = masks.per_head(masks.causal, masks.window(3), masks.full, masks.causal)
    layer = _layer(kv_heads=kv_heads, position=position, mask=pattern)
    x = torch.randn(2, 13, 32, dtype=torch.float64)
    *_, v, inputs = layer.prepare(x)
    torch.testing.assert_close(
        layer(x), layer.output(layer.aggregate(layer.weights(x), v, inputs), inputs)
    )


def test_cog_attention_gives_a_logit_of_zero_no_weight_but_counts_it() -> None:
    layer = _layer(dim=4, heads=1)
    scores = torch.tensor([[[[0.0, 1.0, -2.0, -torch.inf]]]], dtype=torch.float64)
    total = 1 + torch.tensor(1.0).double().exp() + torch.tensor(2.0).double().exp()
    wanted = scores.new_tensor([0.0, 1.0, 2.0, 0.0]).exp() / total
    wanted = wanted * scores.new_tensor([0.0, 1.0, -1.0, 0.0])
    inputs = layer.prepare(torch.randn(1, 1, 4).double())[-1]
    torch.testing.assert_close(layer.normalize(scores, inputs)[0, 0, 0], wanted)
    # The same logits through the fused route: the key of the zero is orthogonal to the query.
    q = scores.new_tensor([[[[1.0, 0.0, 0.0, 0.0]]]]) / layer.scale
    k = torch.zeros(1, 1, 3, 4, dtype=torch.float64)
    k[0, 0, :, 0] = scores[0, 0, 0, :3]
    v = torch.eye(3, dtype=torch.float64)[None, None]
    torch.testing.assert_close(layer.attend(q, k, v, inputs)[0, 0, 0], wanted[:3])


def test_cog_attention_trains_where_all_logits_have_one_sign() -> None:
    """The empty half of a row gives no NaN."""
    layer = _layer(causal=True)
    x = torch.randn(1, 7, 32, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad.isfinite().all()
