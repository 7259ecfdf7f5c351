"""complexformer: phases adapted by each head; left alone, unscaled rotary attention."""

from __future__ import annotations

import pytest
import torch

import attlas


def _layer(**options):
    made = attlas.make("complexformer", **{"dim": 32, "heads": 4, "causal": True, **options})
    made = made.double()
    with torch.no_grad():
        made.phase_bias.normal_()
    return made


def _leave_phases(layer) -> None:
    with torch.no_grad():
        layer.delta.fill_(1.0)
        layer.phase_bias.zero_()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_complexformer_with_unchanged_phases_is_unscaled_rotary_attention(kv_heads: int) -> None:
    layer = _layer(kv_heads=kv_heads)
    _leave_phases(layer)
    plain = attlas.make(
        "softmax", dim=32, heads=4, kv_heads=kv_heads, causal=True, position="rope"
    ).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    plain.scale = 1.0
    x = torch.randn(2, 19, 32, dtype=torch.float64)
    assert float((layer(x) - plain(x)).detach().abs().max()) < 1e-5
    assert float((layer.weights(x) - plain.weights(x)).detach().abs().max()) < 1e-5


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_complexformer_scores_are_the_paper_s_sum_of_cosines(kv_heads: int) -> None:
    layer = _layer(kv_heads=kv_heads, causal=False)
    x = torch.randn(1, 7, 32, dtype=torch.float64)
    q = layer.q_proj(x).view(7, 4, 2, 4)  # token, head, part, plane
    k = layer.k_proj(x).view(7, kv_heads, 2, 4)
    k = k.repeat_interleave(4 // kv_heads, dim=1)
    delta = layer.delta.repeat_interleave(4 // kv_heads, dim=0)
    moduli = [(z.square().sum(2) + 1e-9).sqrt() for z in (q, k)]
    phases = [torch.atan2(z[:, :, 1], z[:, :, 0]) for z in (q, k)]
    far = torch.arange(7.0)[:, None] - torch.arange(7.0)
    rotated = far[..., None, None] * 10000 ** (-torch.arange(4) / 4).double()
    angle = delta * (phases[0][:, None] - phases[1]) + layer.phase_bias + rotated
    scores = (moduli[0][:, None] * moduli[1] * angle.cos()).sum(-1)  # query, key, head
    wanted = scores.permute(2, 0, 1).softmax(-1)[None]
    torch.testing.assert_close(layer.weights(x), wanted, atol=1e-6, rtol=1e-5)


def test_complexformer_starts_as_the_paper_does() -> None:
    torch.manual_seed(0)
    layer = attlas.make("complexformer", dim=256, heads=8)
    assert float(layer.phase_bias.detach().abs().max()) == 0.0
    assert float(layer.delta.detach().std()) == pytest.approx(0.25, abs=0.05)  # 1/√16
    assert float(layer.q_proj.weight.detach().abs().max()) <= (6 / 512) ** 0.5


def test_complexformer_is_finite_at_a_vector_of_zeros() -> None:
    layer = _layer()
    x = torch.zeros(1, 5, 32, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


def test_complexformer_refuses_heads_without_halves() -> None:
    with pytest.raises((ValueError, TypeError), match="head_dim"):
        attlas.make("complexformer", dim=32, heads=4, head_dim=5, position=None)
