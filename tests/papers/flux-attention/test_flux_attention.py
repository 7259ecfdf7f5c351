"""flux-attention: every clause of the catalogue row's works_when, and what routers hang on."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attlas
from attlas import masks
from attlas.attach import attach
from attlas.cache.flux_routers import Router, unrotated
from attlas.calibration import Calibration, calibrate
from attlas.contract.families import distinct
from attlas.contract.parts import small_llama
from attlas.errors import UserError
from attlas.hf.caches import DynamicCache, with_cache
from attlas.parts.select.flux_attention import FluxAttention
from tiny_models import decoder, greedy, prompt

SIZES = {"sinks": 2, "recent": 8, "pool": 8}


def plain(seed: int, tokens: int = 96) -> Tensor:
    """A text of few frequent tokens and many rare ones."""
    generator = torch.Generator().manual_seed(seed)
    often = 1 / torch.arange(1, 63).float() ** 1.5
    return (2 + torch.multinomial(often, tokens, replacement=True, generator=generator))[None]


@cache
def model() -> Any:
    return small_llama(torch.float64)


def trained(budget: float, ordinary: float, steps: int = 60, rate: float = 5e-3) -> FluxAttention:
    part = attlas.make(
        "flux-attention", **SIZES, budget=budget, plain=ordinary, steps=steps, rate=rate
    )
    part.calibration = calibrate(small_llama(torch.float32), part, [plain(s) for s in range(12)])
    return part


def random_routers(**options: Any) -> FluxAttention:
    """Routers as they are before training, with which some layers are sparse."""
    part = attlas.make("flux-attention", **{**SIZES, "steps": 1, **options})
    part.calibration = calibrate(small_llama(), part, [plain(0)])
    return part


def sparse_share(part: FluxAttention) -> float:
    return 1 - torch.stack(list(part.full.values())).float().mean().item()


# Forcing full in every layer reproduces the model ----------------------------------------------------


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_flux_attention_forced_full_is_the_model(side):
    ids = torch.cat([plain(s, 30) for s in range(2)])
    valid = torch.ones_like(ids)
    if side is not None:
        valid[0, slice(0, 6) if side == "left" else slice(24, 30)] = 0
    with torch.no_grad():
        wanted = model()(ids, attention_mask=valid).logits
        with attach(model(), attlas.make("flux-attention", **SIZES, force="full")):
            assert torch.equal(model()(ids, attention_mask=valid).logits, wanted)


@pytest.mark.parametrize("family", distinct("soft-caps", "sinks", "windows"))
def test_flux_attention_forced_full_generates_as_the_model(family):
    net, ids = decoder(family), prompt(tokens=20)
    wanted = greedy(net, ids, 5)
    with attach(net, attlas.make("flux-attention", **SIZES, force="full")):
        assert greedy(net, ids, 5) == wanted


# The fraction of sparse layers follows the budget ----------------------------------------------------


def test_flux_attention_sparse_layers_follow_the_budget():
    net, shares = small_llama(torch.float32), []
    for budget in (0.0, 0.5, 1.0):
        part, found = trained(budget, budget), []
        with torch.no_grad(), attach(net, part):
            for seed in range(100, 105):
                net(plain(seed))
                found.append(sparse_share(part))
        shares.append(sum(found) / 5)
    assert shares == pytest.approx([0, 0.5, 1], abs=0.2)
    assert shares[0] + 0.2 < shares[1] < shares[2] - 0.2


# What sparse layers see ------------------------------------------------------------------------------


def test_flux_attention_forced_sparse_sees_sinks_and_recent_tokens():
    ids = plain(0, 40)
    pattern = masks.causal & (masks.window(8) | masks.sinks(2))
    hidden = torch.zeros(1, 1, 40, 40, dtype=torch.float64)
    hidden.masked_fill_(~masks.dense(pattern, 40, 40), -torch.inf)
    with torch.no_grad():
        wanted = model()(ids, attention_mask=hidden).logits
        with attach(model(), attlas.make("flux-attention", **SIZES, force="sparse")):
            torch.testing.assert_close(model()(ids).logits, wanted)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
@pytest.mark.parametrize("force", ["sparse", None])
def test_flux_attention_rows_are_decided_and_read_alone(force, side):
    part = random_routers(force=force)
    ids = torch.cat([plain(s, 40) for s in range(3)])
    hidden = {"left": slice(0, 11), "right": slice(29, 40), "middle": slice(10, 21)}[side]
    valid = torch.ones_like(ids)
    valid[1, hidden] = 0
    places = (valid.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), attach(model(), part):
        together = model()(ids, attention_mask=valid, position_ids=places).logits
        routes = {layer: full.clone() for layer, full in part.full.items()}
        for row in range(3):
            own = valid[row].bool()
            alone = model()(ids[row][own][None]).logits
            torch.testing.assert_close(together[row][own], alone[0])
            assert {n: bool(f[row]) for n, f in routes.items()} == {
                n: bool(f[0]) for n, f in part.full.items()
            }


def test_flux_attention_steps_see_what_a_whole_pass_sees():
    """A decision holds for generated tokens, whatever the text becomes."""
    part = random_routers()
    ids = torch.cat([plain(s, 40) for s in range(2)])
    with torch.no_grad(), attach(model(), part):
        cache_ = DynamicCache()
        model()(ids[:, :30], **with_cache(model(), cache_))
        routes = {layer: full.clone() for layer, full in part.full.items()}
        mixed = torch.stack(list(routes.values()))
        steps = [model()(ids[:, t : t + 1], **with_cache(model(), cache_)).logits for t in range(30, 40)]
        again = DynamicCache()
        model()(ids[:, :30], **with_cache(model(), again))
        piece = model()(ids[:, 30:], **with_cache(model(), again)).logits
    assert mixed.any()
    assert not mixed.all()
    torch.testing.assert_close(torch.cat(steps, 1), piece)


def test_flux_attention_two_caches_keep_their_own_decisions():
    part = random_routers()
    first, second = plain(0, 30), plain(7, 30).flip(1)
    with torch.no_grad(), attach(model(), part):
        alone = DynamicCache()
        model()(first, **with_cache(model(), alone))
        wanted = model()(first[:, :1], **with_cache(model(), alone)).logits
        here, there = DynamicCache(), DynamicCache()
        model()(first, **with_cache(model(), here))
        model()(second, **with_cache(model(), there))
        assert torch.equal(model()(first[:, :1], **with_cache(model(), here)).logits, wanted)


def test_flux_attention_density_is_told():
    part = attlas.make("flux-attention", sinks=2, recent=8, force="sparse", dense_layers=(0,))
    with torch.no_grad(), attach(model(), part):
        model()(plain(0, 512))
    assert 0 not in part.density
    assert all(0 < float(d.max()) < 0.7 for d in part.density.values())


# The router ------------------------------------------------------------------------------------------


def test_flux_attention_router_pools_unrotated_ends():
    torch.manual_seed(0)
    router, q = Router(8).double(), torch.randn(2, 3, 20, 8, dtype=torch.float64)
    ends = torch.cat((q[:, :, :4], q[:, :, -4:]), 2).mean((1, 2)).float()
    logits = router.float()(q, 4)
    torch.testing.assert_close(logits, router.head(router.features(ends)))
    changed = q.clone()
    changed[:, :, 4:-4] += 1
    assert torch.equal(router(changed, 4), logits)
    assert unrotated(None, q, torch.zeros(1), None) is q


def test_flux_attention_queries_are_those_before_rotation():
    part, found = random_routers(), {}
    layer = model().model.layers[2].self_attn

    def seen(module: Any, given: Any, y: Tensor) -> None:
        found["projected"] = y.unflatten(-1, (4, 8)).transpose(1, 2)

    router_given = {}
    with torch.no_grad(), attach(model(), part):
        handle = layer.q_proj.register_forward_hook(seen)
        part.routers["2"].register_forward_pre_hook(lambda m, given: router_given.update(q=given[0]))
        model()(plain(3, 40))
        handle.remove()
    torch.testing.assert_close(
        router_given["q"].double(), found["projected"], atol=1e-5, rtol=1e-4
    )


# Calibration -----------------------------------------------------------------------------------------


def test_flux_attention_routers_are_trained_with_the_model_frozen(tmp_path: Path):
    net = small_llama(torch.float32)
    before = copy.deepcopy(net.state_dict())
    part = attlas.make("flux-attention", **SIZES, steps=6)
    found = calibrate(net, part, [plain(s) for s in range(3)])
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in net.parameters())
    short = attlas.make("flux-attention", **SIZES, steps=1)
    start = calibrate(net, short, [plain(s) for s in range(3)])
    assert not torch.equal(start.tensors["0.head.4.bias"], found.tensors["0.head.4.bias"])
    path = found.save(tmp_path / "routers.safetensors")
    loaded = attlas.make("flux-attention", **SIZES, steps=6, calibration=path)
    held = attlas.make("flux-attention", **SIZES, steps=6, calibration=Calibration.load(path))
    said = []
    for one in (loaded, held):
        with torch.no_grad(), attach(net, one):
            said.append(net(plain(9)).logits)
    assert torch.equal(*said)


def test_flux_attention_interrupted_training_goes_on(tmp_path: Path):
    net, texts = small_llama(torch.float32), [plain(s) for s in range(3)]
    part = attlas.make("flux-attention", **SIZES, steps=8)
    whole = calibrate(net, part, texts)

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    partial = tmp_path / "partial.safetensors"
    with pytest.raises(KeyboardInterrupt):
        calibrate(net, part, texts, partial=partial, tick=stop)
    ticks: list[int] = []
    went_on = calibrate(net, part, texts, partial=partial, tick=lambda done, _: ticks.append(done))
    assert ticks[0] == 5
    assert all(torch.equal(t, whole.tensors[name]) for name, t in went_on.tensors.items())


def test_flux_attention_refuses_what_it_cannot_do():
    part = attlas.make("flux-attention", sinks=4, recent=200, steps=1)
    with pytest.raises(UserError, match="recent=200 sees all of a passage of 96"):
        calibrate(model(), part, [plain(0)])
    other = random_routers()
    with pytest.raises(UserError, match="calibrated for"), attach(
        model(), attlas.make("flux-attention", **SIZES, steps=2, calibration=other.calibration)
    ):
        pass
    with pytest.raises(ValueError, match="force"):
        attlas.make("flux-attention", force="half")
