"""What each quantiser says of itself, on small tensors."""

import math

import pytest
import torch
from torch import nn

import attlas
from attlas.attach.call import Call, ForwardPass
from attlas.cache.fitting import Rounded, begun, finished, loss
from attlas.calibration import calibrate
from attlas.ops.quantize import encode
from attlas.parts.quantize.qaq import centred, group_bits, key_error, outlying
from attlas.parts.quantize.zipcache import channel_scale, least, saliency
from attlas.storage.layer import LayerState, StoredLayer, Taken
from attlas.storage.shared import encode_rows
from attlas.storage.varied import Varied
from tiny_models import decoder, prompt


def layer_of(k, v=None, **tensors):
    state = LayerState(0, (0, 1, 2, 3), scaling=k.shape[-1] ** -0.5, tensors=tensors)
    layer = StoredLayer({"Part": state})
    layer.update(k, k if v is None else v)
    return layer, state


def test_zipcache_all_rows_as_probes_give_the_exact_score():
    q, k = torch.randn(2, 4, 30, 8), torch.randn(2, 2, 30, 8)
    layer, state = layer_of(k, queries=q, columns=torch.arange(30).expand(2, -1))
    keys = k.repeat_interleave(2, dim=1)
    scores = q @ keys.transpose(-1, -2) / math.sqrt(8)
    future = torch.ones(30, 30, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
    expected = weights.sum(dim=2) / (30 - torch.arange(30))
    expected = expected.unflatten(1, (2, 2)).sum(dim=2)
    assert torch.allclose(saliency(layer, state, layer.rows()), expected, atol=1e-6)


def test_zipcache_probes_see_what_is_encoded_already():
    """After a block was encoded the probes' attention still sums to one over all tokens."""
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 40, 8)
    layer, state = layer_of(k, queries=q, columns=torch.arange(36, 40)[None])
    whole = saliency(layer, state, layer.rows())
    part, probes = (
        attlas.make("zipcache", salient_bits=16, other_bits=16, block=16),
        dict(state.tensors),
    )
    part.compress(layer, state, layer.rows())
    state.tensors |= probes
    assert layer.dense_slots == 8
    assert torch.allclose(saliency(layer, state, layer.rows()), whole[..., 32:], atol=1e-5)


def test_zipcache_divides_by_the_channels_and_shares_steps():
    x = torch.randn(1, 3, 20, 8) * torch.logspace(-2, 1, 8)
    valid = torch.ones(1, 3, 20, dtype=torch.bool)
    scale = channel_scale(x, valid)
    plain, divided = encode_rows(x, 4), encode_rows(x, 4, channel=scale)
    small = slice(0, 4)
    assert (divided.read() - x)[..., small].abs().mean() < (plain.read() - x)[
        ..., small
    ].abs().mean()
    assert divided.step.stride(1) == 0
    own = encode(x[:, :1], 4, channel=scale[:, :1], meta=torch.float32).read()
    alone = encode_rows(x[:, :1], 4, channel=scale[:, :1], meta=torch.float32).read()
    assert torch.equal(own, alone)
    assert int(least(torch.rand(1, 3, 20), valid, 0.4).sum()) == 3 * 8


@pytest.mark.parametrize("centre", ["middle", "zero"])
def test_qaq_error_stays_within_half_a_step(centre):
    x = torch.randn(10, 2, 1, 64).exp()
    apart = outlying(x, 0.05)
    bits = torch.randint(1, 9, (10, 2, 1))
    mean, scale = centred(x, apart, bits, "uniform", centre)
    held = Varied.packed(x, bits, mean, scale, apart, heads=4, normal=False)
    found = held.read().permute(2, 0, 1, 3).flatten(2)[:, :, None]
    assert torch.equal(found[apart], x[apart])
    # The largest code is one short, so that the highest number may be off by a whole step.
    assert ((found - x).abs() <= scale[..., None] * (1 + 1e-4)).all()


def test_qaq_centred_at_the_mean_cuts_off_at_any_bits():
    x = torch.randn(4, 1, 1, 64).exp()
    none, bits = torch.zeros_like(x, dtype=torch.bool), torch.full((4, 1, 1), 16)
    errors = []
    for centre in ("middle", "mean"):
        held = Varied.packed(
            x, bits, *centred(x, none, bits, "uniform", centre), none, heads=1, normal=False
        )
        errors.append(float((held.read()[0, 0] - x[:, 0, 0]).abs().max()))
    assert errors[0] < 1e-3
    assert errors[1] > 0.1


def test_qaq_bits_follow_the_error_and_normal_codes_are_finite():
    x = torch.randn(6, 2, 1, 64)
    apart = outlying(x, 0.0)
    tokens = torch.tensor([100, 1000])
    loose, tight = (
        group_bits(x, apart, key_error(tokens, e, 30.0)[:, None], 1, 16) for e in (1.0, 0.001)
    )
    assert (tight > loose).all()
    for n in (1, 3, 8):
        bits = torch.full((6, 2, 1), n)
        held = Varied.packed(
            x, bits, *centred(x, apart, bits, "normal", "mean"), apart, heads=2, normal=True
        )
        assert held.read().isfinite().all()
        assert held.data[n].shape == (12, 64 * n // 8)


def test_qaq_reads_runs_and_rows():
    x = torch.randn(9, 3, 2, 12)
    bits = torch.randint(0, 17, (9, 3, 2))
    bits[4:, 1] = 255
    apart = outlying(x, 0.2)
    mean, scale = centred(x, apart, bits.clamp(max=16), "uniform", "middle")
    held = Varied.packed(x, bits, mean, scale, apart, heads=2, normal=False)
    whole = held.read()
    assert torch.equal(torch.cat([held.read(0, 4), held.read(4, 9)], dim=2), whole)
    order = torch.tensor([2, 1, 1, 0])
    assert torch.equal(held.rows(order).read(), whole[order])


@pytest.fixture(scope="module")
def fitted():
    model = decoder("llama")
    texts = [prompt(1, 48, seed=s) for s in range(3)]
    part = attlas.make("wkvquant", bits=2, channel_group=8, steps=24, length=48, rate=2e-2)
    return model, part, texts, calibrate(model, part, texts)


def test_wkvquant_fit_lowers_the_loss(fitted):
    model, part, texts, calibration = fitted
    start = finished(begun(model, texts))
    with torch.no_grad():
        before, after = (
            sum(float(loss(part, model, t, c)) for t in texts) for c in (start, calibration.tensors)
        )
    assert after < 0.95 * before
    assert not any(p.grad is not None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_wkvquant_shift_and_scale_alone_change_nothing(fitted):
    model, _, texts, calibration = fitted
    tensors = {
        n: torch.ones_like(t) if n.endswith("clip") else t for n, t in calibration.tensors.items()
    }
    exact = attlas.make("wkvquant", bits=16, channel_group=8)
    with torch.no_grad():
        assert float(loss(exact, model, texts[0], tensors)) < 1e-4


def test_wkvquant_past_only_is_never_worse(fitted):
    """A query's own key and value are exact in its own step, others are rounded."""
    _, part, _, calibration = fitted
    q, k, v = torch.randn(1, 4, 20, 16), *torch.randn(2, 1, 2, 20, 16)
    call = Call(0, nn.Identity(), q, k, v, 0.25, None, ForwardPass(length=20), is_causal=True)
    coded = Rounded(part, calibration.tensors)
    past_only = coded.attend(call).transpose(1, 2)
    attend = nn.functional.scaled_dot_product_attention
    exact = attend(q, k, v, is_causal=True, enable_gqa=True)
    keys, values = coded._coded(call, "k", k), coded._coded(call, "v", v)
    every = attend(q, keys, values, is_causal=True, enable_gqa=True)
    assert (past_only - exact).abs().mean() < (every - exact).abs().mean()
    assert torch.allclose(past_only[:, :, 0], exact[:, :, 0], atol=1e-6)


def test_wkvquant_fit_and_cache_round_alike(fitted):
    """What the fit imitates is what the cache holds, but for steps of half precision."""
    model, part, _, calibration = fitted
    part.calibration = calibration
    part.check(model)
    k, v = torch.randn(2, 1, 2, 20, 16)
    body = part.encode(LayerState(1, (0, 1, 2, 3)), Taken(k, v, None, 0))["context"]
    call = Call(1, nn.Identity(), k, k, v, 0.25, None, ForwardPass(length=20))
    coded = Rounded(part, calibration.tensors)
    for which, x, held in zip("kv", (k, v), body.read(), strict=True):
        off = (coded._coded(call, which, x) - held).abs() > 1e-2  # a number between two codes
        assert off.float().mean() < 0.01


def test_wkvquant_fit_goes_on_where_it_was_cut(fitted, tmp_path):
    model, _, texts, _ = fitted
    part = attlas.make("wkvquant", bits=2, steps=4, length=24)
    expected = calibrate(model, part, texts).tensors

    def cut(done, total):
        if done == 2:
            raise KeyboardInterrupt

    partial = tmp_path / "partial"
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, part, texts, partial=partial, tick=cut)
    seen = []
    found = calibrate(
        model, part, texts, partial=partial, tick=lambda done, _: seen.append(done)
    ).tensors
    assert seen[0] == 2
    assert all(torch.equal(found[name], expected[name]) for name in expected)
