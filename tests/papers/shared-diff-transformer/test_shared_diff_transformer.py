"""shared-diff-transformer: no updates is (1 − λ) softmax, full rank is any differential layer."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange

import attlas


def _layer(**options):
    made = attlas.make("shared-diff-transformer", **{"dim": 32, "heads": 2, **options})
    return made.double()


def test_shared_diff_transformer_without_updates_is_a_share_of_softmax() -> None:
    layer = _layer(causal=True, rank=3, depth=2)
    with torch.no_grad():
        layer.q_proj.up.zero_()
        layer.k_proj.up.zero_()
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    q, k, *_ = layer.prepare(x)
    assert torch.equal(q[:, 0::2], q[:, 1::2])
    assert torch.equal(k[:, 0::2], k[:, 1::2])
    plain = attlas.Attention(32, 2, head_dim=8, causal=True).double()
    with torch.no_grad():
        plain.q_proj.weight.copy_(layer.q_proj.base.weight)
        plain.k_proj.weight.copy_(layer.k_proj.base.weight)
    wanted = (1 - layer.lambda_) * plain.weights(x)
    torch.testing.assert_close(layer.weights(x), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_shared_diff_transformer_at_full_rank_is_any_differential_layer(
    kv_heads: int, bias: bool
) -> None:
    options = {"heads": 4, "kv_heads": kv_heads, "causal": True, "position": "rope"}
    wanted = attlas.make("differential-transformer", dim=32, **options).double()
    layer = _layer(**options, rank=16, bias=bias)
    weights = {n: w for n, w in wanted.state_dict().items() if n[:6] not in ("q_proj", "k_proj")}
    _, unexpected = layer.load_state_dict(weights, strict=False)
    assert not unexpected
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            if bias:
                getattr(getattr(layer, name), "base", getattr(layer, name)).bias.zero_()
        for name in ("q_proj", "k_proj"):
            # Two different targets, each an arbitrary base away from what is wanted.
            theirs, ours = getattr(wanted, name).weight, getattr(layer, name)
            target = rearrange(theirs, "(h two d) x -> two (h d) x", two=2, d=4) - ours.base.weight
            width = target.shape[1]
            ours.up.zero_()
            ours.up[:, :width] = torch.eye(width)
            rearrange(ours.down.weight, "(two r) x -> two r x", two=2)[:, :width] = target
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x), wanted(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kv_heads", "rank"), [(4, 3), (2, 3), (4, None)])
def test_shared_diff_transformer_saves_the_predicted_parameters(
    kv_heads: int, rank: int | None
) -> None:
    dim, heads, head_dim = 64, 4, 8
    layer = _layer(dim=dim, heads=heads, kv_heads=kv_heads, rank=rank)
    whole = attlas.make("differential-transformer", dim=dim, heads=heads, kv_heads=kv_heads)
    r = head_dim if rank is None else rank
    for name, width in (("q_proj", heads * head_dim), ("k_proj", kv_heads * head_dim)):
        ours, theirs = (
            sum(p.numel() for p in getattr(made, name).parameters()) for made in (layer, whole)
        )
        assert theirs == 2 * dim * width
        assert ours == dim * width + 2 * r * (dim + width)
        assert ours < theirs


def test_shared_diff_transformer_starts_with_two_different_maps() -> None:
    layer = _layer()
    q, k, *_ = layer.prepare(torch.randn(1, 5, 32, dtype=torch.float64))
    assert (q[:, 0::2] - q[:, 1::2]).abs().mean() > 0.05
    assert (k[:, 0::2] - k[:, 1::2]).abs().mean() > 0.05


def test_shared_diff_transformer_refuses_no_rank() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1"):
        _layer(rank=0)
