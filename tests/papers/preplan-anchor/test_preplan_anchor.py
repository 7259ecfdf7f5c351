"""What the row of preplan and anchor signals says, clause by clause."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from attlas.attach import attach
from attlas.attach.call import Call, ForwardPass
from attlas.contract.cases import load_cases, run_case
from attlas.contract.parts import prompt, small_llama
from attlas.hf.caches import cache_of, with_cache
from attlas.parts.record.preplan_anchor import (
    PreplanAnchor,
    Rhythm,
    credit,
    middle_layers,
    weighted_advantages,
)

HERE = Path(__file__).parent
RESULTS = HERE.parents[2] / "benchmarks" / "results" / "preplan-anchor-cpu.json"


@pytest.mark.parametrize("case", load_cases(HERE / "golden"), ids=lambda c: c.label)
def test_published_vectors(case):
    assert [r.reason for r in run_case(case) if r.status != "passed"] == []


def of_map(weights, **options):
    """The recorder of one map, as the only head of layer 0."""
    recorder, tokens = PreplanAnchor(layers=[0], **options), len(weights)
    step, at = ForwardPass(length=tokens), torch.arange(tokens)
    empty = torch.zeros(1, 1, tokens, 1)
    recorder.begin(step)
    call = Call(0, nn.Identity(), empty, empty, empty, 1.0, None, step, is_causal=True)
    recorder.update(call, weights[None, None], at, at)
    return recorder


@pytest.mark.parametrize(("band", "window"), [(4, 10), (16, 6), (1, 3)])
def test_preplan_anchor_waad_of_a_banded_map(band, window):
    """Each query spreads evenly over the `band` newest tokens: WAAD = mean of min(d, W) over them."""
    at = torch.arange(40)
    back = at[:, None] - at
    weights = ((back >= 0) & (back < band)).double()
    weights /= weights.sum(-1, keepdim=True)
    waad = of_map(weights, window=window).rhythm().waad[0]
    for t in range(40):
        seen = min(t + 1, band)
        assert waad[t] == pytest.approx(sum(min(d, window) for d in range(seen)) / seen)


def test_preplan_anchor_fai_of_a_column_read_by_all_later_tokens_is_one():
    weights = torch.eye(80, dtype=torch.float64)
    weights[13:] = 0
    weights[13:, 12] = 1
    fai = of_map(weights).rhythm().fai[0]
    assert fai[12] == 1
    assert not fai[:12].any()
    assert not fai[13:].any()


def test_preplan_anchor_gain_of_one_is_the_plain_policy_gradient():
    model, ids = small_llama(), prompt(24, 2)
    recorder = PreplanAnchor(nearest=2, farthest=6)
    with torch.no_grad(), attach(model, record=[recorder]):
        model(ids)
    rhythm = recorder.rhythm(8)
    advantages = torch.randn(2, 16, dtype=torch.float64)

    def gradient(weights):
        model.zero_grad()
        told = model(ids).logits[:, 7:-1].log_softmax(-1).gather(-1, ids[:, 8:, None])[..., 0]
        (-(weights * told).mean()).backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    plain = gradient(advantages)
    for name, grad in gradient(weighted_advantages(advantages, rhythm, gain=1.0)).items():
        assert torch.equal(grad, plain[name])
    weighted = weighted_advantages(advantages, rhythm)
    assert not torch.equal(weighted, advantages)
    other = gradient(weighted)
    assert any(not torch.equal(other[name], grad) for name, grad in plain.items())


def test_preplan_anchor_credit_leaves_padding_alone():
    waad, fai, advantages = torch.rand(2, 12), torch.rand(2, 12), torch.rand(2, 12)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 8:] = False
    found = weighted_advantages(advantages, Rhythm(waad, fai), valid)
    assert torch.equal(found[1, 8:], advantages[1, 8:])
    alone = weighted_advantages(advantages[1:, :8], Rhythm(waad[1:, :8], fai[1:, :8]))
    assert torch.equal(found[1:, :8], alone)


def test_preplan_anchor_credit_of_two_tokens_is_one():
    assert torch.equal(credit(torch.rand(2), torch.rand(2)), torch.ones(2))


def recorded(model, *pieces, options=None, **given):
    recorder, cache = PreplanAnchor(**{"nearest": 2, "farthest": 6, **(options or {})}), None
    with torch.no_grad(), attach(model, record=[recorder]):
        for piece in pieces:
            more = {"use_cache": True} if cache is None else with_cache(model, cache)
            cache = cache_of(model(piece, **more, **given))
    return recorder


@pytest.mark.parametrize("sizes", [[10, 10, 4], [20, 1, 1, 1, 1], [1, 23]])
def test_preplan_anchor_of_pieces_is_that_of_one_pass(sizes):
    model, ids = small_llama(), prompt(24, 2)
    whole, pieces = recorded(model, ids), recorded(model, *ids.split(sizes, dim=1))
    for ours, theirs in zip(pieces.rhythm(), whole.rhythm(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_preplan_anchor_leaves_padding_out(side):
    model, ids = small_llama(), prompt(20)
    empty = torch.zeros_like(ids[:, :5])
    padded = torch.cat([empty, ids] if side == "left" else [ids, empty], dim=1)
    mask = (padded != 0).long()
    own = slice(5, None) if side == "left" else slice(None, 20)
    found = recorded(model, padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    alone = recorded(model, ids)
    assert found.local_and_global() == alone.local_and_global()
    for ours, theirs in zip(found.rhythm(), alone.rhythm(), strict=True):
        torch.testing.assert_close(ours[:, own], theirs)


def test_preplan_anchor_signals_are_those_of_whole_maps():
    """FAI and WAAD by loops over the weights, of some heads of some layers."""
    model, ids = small_llama(), prompt(24)
    recorder = PreplanAnchor(window=4, nearest=2, farthest=6, layers=[1, 3], heads=[0, 2, 3])
    with torch.no_grad(), attach(model, record=[recorder, "weights"]) as session:
        model(ids)
    maps, (local, far) = session["weights"][:, 0], recorder.local_and_global()
    near, wide = (torch.stack([maps[at] for at in heads]).mean(0) for heads in (local, far))
    found = recorder.rhythm()
    for t in range(24):
        waad = sum(near[t, s] * min(t - s, 4) for s in range(t + 1))
        later = [wide[u, t] for u in range(t + 2, min(t + 6, 23) + 1)]
        assert float(found.waad[0, t]) == pytest.approx(float(waad))
        assert float(found.fai[0, t]) == pytest.approx(float(sum(later)) / max(1, len(later)))


def test_preplan_anchor_layers_are_those_of_the_middle_third():
    assert middle_layers(30, 5) == [10, 12, 15, 18, 20]
    assert middle_layers(6, 5) == [2, 3, 4]
    assert middle_layers(1, 5) == [0]
    assert middle_layers(36, 1) == [18]


def test_preplan_anchor_peaks_of_smollm2():
    """benchmarks/preplan_anchor.py: FAI peaks of generated chains on digits and operators, and chance."""
    rows = {r["signal"]: r for r in json.loads(RESULTS.read_text())["results"] if "signal" in r}
    assert rows["fai"]["chains"] >= 100
    assert rows["fai"]["low"] > 0  # of the excess over chance, 95 % over chains


@pytest.mark.parametrize(
    ("options", "named"),
    [({"window": 0}, "window"), ({"nearest": 9, "farthest": 3}, "farthest"), ({"share": 0.7}, "share")],
)
def test_preplan_anchor_refuses_by_name(options, named):
    with pytest.raises(ValueError, match=named):
        PreplanAnchor(**options)
    with pytest.raises(ValueError, match="fai"):
        credit(torch.rand(3), torch.rand(4))
    with pytest.raises(ValueError, match="top"):
        credit(torch.rand(3), torch.rand(3), top=1.5)
