"""What the row of massive values says, sentence by sentence."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from attlas.attach import attach
from attlas.contract.parts import continued, prompt, small_llama
from attlas.hf.caches import cache_of, with_cache
from attlas.parts.evict.snapkv import SnapKV
from attlas.parts.record.massive_values import MassiveValues, MassiveValuesDisruption
from attlas.tasks.record import share
from attlas.tasks.text import passage

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "massive-values-cpu.json"
TEXT = "The keeper counted the lights of the fishing boats and drew a circle for each. " * 4


def recorded(model, *pieces, mask=None, positions=None, **options):
    """What is recorded of a sequence that comes in pieces."""
    recorder, cache, at = MassiveValues(**options), None, 0
    with torch.no_grad(), attach(model, record=[recorder]):
        for piece in pieces:
            given = {"use_cache": True} if cache is None else with_cache(model, cache)
            stop = at + piece.shape[1]
            if mask is not None:
                given |= {"attention_mask": mask[:, :stop], "position_ids": positions[:, at:stop]}
            cache, at = cache_of(model(piece, **given)), stop
    return recorder.result()


def by_hand(model, ids):
    """Norms of the model's own states: of what enters each block, and of its projections, rotated."""
    found = {"q": [], "k": [], "v": []}
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, use_cache=True)
        residual = torch.stack(out.hidden_states[:-1]).norm(dim=2)
        places = torch.arange(ids.shape[1])[None]
        for layer, block in enumerate(model.model.layers):
            x = out.hidden_states[layer]
            cos, sin = model.model.rotary_emb(x, places)
            split = (*x.shape[:2], -1, block.self_attn.head_dim)
            q = block.self_attn.q_proj(block.input_layernorm(x)).view(split).transpose(1, 2)
            a, b = q.chunk(2, dim=-1)
            found["q"].append((q * cos + torch.cat([-b, a], dim=-1) * sin).norm(dim=2))
            cache = cache_of(out).layers[layer]
            found["k"].append(cache.keys.norm(dim=2))
            found["v"].append(cache.values.norm(dim=2))
    return {name: torch.stack(each) for name, each in found.items()} | {"residual": residual}


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value.to(found[name].dtype), atol=1e-5, rtol=1e-5, msg=name
        )


# Norms -----------------------------------------------------------------------------------------------


def test_massive_values_are_norms_of_the_models_own_states():
    model, ids = small_llama(), prompt(24, 2)
    same(recorded(model, ids), by_hand(model, ids))


def test_massive_values_of_the_stream_equal_hidden_states_of_smollm2(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, :32]
    found = recorded(model, ids)["residual"]
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    assert found.shape == (30, 1, 576)
    torch.testing.assert_close(found, torch.stack(states[:-1]).norm(dim=2), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("sizes", [[10, 10, 4], [20, 1, 1, 1, 1], [1, 1, 22]])
def test_massive_values_of_pieces_add_up_to_one_pass(sizes):
    model, ids = small_llama(), prompt(24, 2)
    same(recorded(model, *ids.split(sizes, dim=1)), recorded(model, ids))


def test_massive_values_begin_anew_with_each_sequence():
    model, ids = small_llama(), prompt(24, 2)
    recorder = MassiveValues()
    with torch.no_grad(), attach(model, record=[recorder]):
        model(prompt(30, 2, seed=5))
        model(ids)
    same(recorder.result(), recorded(model, ids))


@pytest.mark.parametrize("sizes", [[25], [10, 14, 1]])
@pytest.mark.parametrize("side", ["left", "right"])
def test_massive_values_leave_padding_out(side, sizes):
    model, ids = small_llama(), prompt(20)
    empty = torch.zeros_like(ids[:, :5])
    padded = torch.cat([empty, ids] if side == "left" else [ids, empty], dim=1)
    both = torch.cat([padded, prompt(25, seed=3)])
    mask = torch.ones_like(both)
    mask[0] = (padded[0] != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = recorded(model, *both.split(sizes, dim=1), mask=mask, positions=positions)
    alone = recorded(model, ids)
    same({name: x[:, :1] for name, x in found.items()}, alone)


def test_massive_values_beside_a_cache_policy():
    """Of a cache that drops tokens all tokens count that came."""
    model, ids = small_llama(), prompt(24, 2)
    found, plain = MassiveValues(), recorded(model, ids)
    with torch.no_grad(), attach(model, SnapKV(keep=0.3, window=4), record=[found]):
        cache = cache_of(model(ids, use_cache=True))
        same(found.result(), plain)
        before = found.result()["k"]
        model(ids[:, :1], **with_cache(model, cache))
    own = cache.layers[0].read()[0][:, :, -1].square()
    after = found.result()["k"]
    # Of the difference of two sums no more is known than the sums' own rounding leaves.
    rounding = 8 * torch.finfo(torch.float32).eps * after.square().max().item()
    found = (after.square() - before.square())[0]
    torch.testing.assert_close(found, own.float(), rtol=1e-5, atol=rounding)


def test_massive_values_are_those_above_a_multiple_of_the_mean():
    model, ids = small_llama(), prompt(24, 2)
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight[3] *= 100  # dimension 3 of key head 0
    recorder = MassiveValues(layers=[2])
    with torch.no_grad(), attach(model, record=[recorder]):
        model(ids)
    assert recorder.massive()["v"][0, :, 0].nonzero()[:, 1].tolist() == [3, 3]
    assert not recorder.massive()["v"][0, :, 1].any()
    assert not recorder.massive(8.0)["v"].any()  # of eight dimensions none is above their sum
    with pytest.raises(ValueError, match="ratio must be positive"):
        recorder.massive(0.0)


def test_massive_values_of_some_layers():
    model, ids = small_llama(), prompt(24, 2)
    every, some = recorded(model, ids), recorded(model, ids, layers=[1, -1])
    for name, value in some.items():
        assert torch.equal(value, every[name][[1, 5]])


def test_massive_values_refuse_blocks_that_cannot_be_told_apart():
    """Two lists of blocks bear the same numbers: a second stack that the model holds."""
    model, ids = small_llama(), prompt(24)
    plain = model(ids).logits
    model.model.others = model.model.layers[:2]
    model.model.others[0] = copy.deepcopy(model.model.layers[0])
    told = r"MassiveValues asks for 'residual', which LlamaForCausalLM cannot give: .* told apart"
    with pytest.raises(ValueError, match=told):
        attach(model, record=["massive-values"]).__enter__()
    assert torch.equal(model(ids).logits, plain)  # and nothing is left behind


# Disruption ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_massive_values_disruption_puts_the_mean_in_their_place(which):
    model, ids = small_llama(), prompt(24, 2)
    seen = {}

    class Looks(MassiveValuesDisruption):
        def position(self, call, q, k):
            seen[call.layer] = (q, k), super().position(call, q, k)
            return seen[call.layer][1]

    with torch.no_grad(), attach(model, Looks(2, which=which, layers=[1], heads=[0, 1])):
        model(ids)
    for before, after in zip(*seen[1], strict=True):
        at = before[:, 0].norm(dim=1).topk(2, dim=-1, largest=which == "largest").indices
        expected = before[:, 0].clone()
        for row in range(2):
            expected[row][:, at[row]] = before[row, 0][:, at[row]].mean(dim=0)
        torch.testing.assert_close(after[:, 0], expected)
    (q, k), (new_q, new_k) = seen[1]
    assert torch.equal(q[:, 2:], new_q[:, 2:])
    assert torch.equal(k[:, 1], new_k[:, 1])  # serves heads 2 and 3 alone


def test_massive_values_disruption_leaves_the_cache_and_steps_alone():
    model, ids = small_llama(), prompt(24, 2)
    with torch.no_grad():
        plain = cache_of(model(ids, use_cache=True))
        with attach(model, MassiveValuesDisruption(2, layers=[-1])):
            cache = cache_of(model(ids, use_cache=True))
            assert torch.equal(cache.layers[-1].keys, plain.layers[-1].keys)
            found = model(ids[:, :1], **with_cache(model, cache)).logits
        assert torch.equal(found, model(ids[:, :1], **with_cache(model, plain)).logits)


def test_massive_values_disruption_knows_no_padding():
    model, ids = small_llama(), prompt(20)
    padded = torch.cat([torch.zeros_like(ids[:, :5]), ids], dim=1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), attach(model, MassiveValuesDisruption(2)):
        alone = model(ids).logits
        found = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(found, alone)


def test_massive_values_disruption_of_nothing_is_the_model():
    model, ids = small_llama(), prompt(24, 2)
    plain = continued(model, ids)
    with attach(model, MassiveValuesDisruption(0)):
        torch.testing.assert_close(continued(model, ids), plain)


@pytest.mark.parametrize(
    ("options", "named"), [({"dimensions": -1}, "dimensions"), ({"which": "widest"}, "which")]
)
def test_massive_values_disruption_refuses_by_name(options, named):
    with pytest.raises((ValueError, TypeCheckError), match=named):
        MassiveValuesDisruption(**options)


# On SmolLM2 ------------------------------------------------------------------------------------------


def test_massive_values_of_smollm2_are_slow_ones_of_queries_and_keys(smollm2):
    """Over 70 % of the heads of q and k, under 5 % of those of v, in the slow third of the pairs."""
    model, tokenizer = smollm2
    text = passage(random.Random(0), 800)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :96]
    recorder = MassiveValues()
    with torch.no_grad(), attach(model, record=[recorder]):
        model(ids, logits_to_keep=1)
    massive = recorder.massive()
    heads = {name: massive[name].any(dim=-1).float().mean().item() for name in "qkv"}
    assert min(heads["q"], heads["k"]) > 0.7
    assert heads["v"] < 0.05
    for name in "qk":
        pairs = massive[name].shape[-1] // 2
        at = massive[name].nonzero()[:, -1] % pairs  # i and i + dim/2 are rotated together
        assert (at >= pairs - pairs // 3).float().mean() > 0.95


def test_massive_values_of_smollm2_over_passages():
    """The same of eight passages of Shakespeare, as measured by benchmarks/massive_values.py."""
    rows = {(r["what"], r["of"]): r for r in measured() if r["what"] != "passkey"}
    assert rows["heads with one", "q"]["low"] > 0.7
    assert rows["heads with one", "k"]["low"] > 0.7
    assert rows["heads with one", "v"]["share"] < 0.05
    for name in "qk":
        assert rows["in the slow third", name]["low"] > 0.95


def test_massive_values_disrupted_cost_the_passkey_and_small_ones_do_not():
    """120 hidden numbers; intervals are of 95 %."""
    found = {
        (r["dimensions"], r["which"]): share(r["hits"], r["n"])
        for r in measured()
        if r["what"] == "passkey"
    }
    alone = found.pop((0, "none"))
    assert alone.n >= 100
    for (dimensions, which), each in found.items():
        if which == "largest":
            assert each.n == alone.n
            small = found[dimensions, "smallest"]
            assert each.high < min(alone.low, small.low), dimensions
            assert alone.value - each.value > 5 * (alone.value - small.value), dimensions


def measured():
    return json.loads(RESULTS.read_text())["results"]
