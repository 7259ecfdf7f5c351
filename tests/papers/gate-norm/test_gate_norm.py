"""What the row of Gate-Norm says, sentence by sentence, and what a removed layer does to caches."""

from __future__ import annotations

import random
from statistics import fmean

import pytest
import torch
from jaxtyping import TypeCheckError
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import attlas
from attlas.adapt.gate_norm import GateNorm, NoKeys, coupling
from attlas.adapting.texts import held_out, judged
from attlas.attach.session import cache_bytes
from attlas.contract.parts import continued, prompt, small_llama
from attlas.hf.caches import cache_of, with_cache
from attlas.kinds.adapter import Adapter

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
}  # fmt: skip


class Given(GateNorm):
    """Removes the layers that it is told."""

    def __init__(self, removed: list[int]) -> None:
        super().__init__(layers=len(removed))
        self.saved = {"removed": torch.tensor(removed)}


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def zeroed(removed: list[int]):
    """The small Llama whose attention adds nothing in these layers, and still runs."""
    model = small_llama()
    with torch.no_grad():
        for number in removed:
            model.model.layers[number].self_attn.o_proj.weight.zero_()
    return model


# The trick equals the explicit norm (1e-4) -----------------------------------------------------------


@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (4, 2), (6, 3), (3, 3)])
def test_the_trick_equals_the_explicit_norm(heads, groups):
    width, dim = 8, 40
    q, k = torch.randn(heads * width, dim), torch.randn(heads // groups * width, dim)
    squares = 0.0
    for head in range(heads):
        of_head, of_key = head * width, head // groups * width
        w_q, w_k = q[of_head : of_head + width].T, k[of_key : of_key + width].T
        squares += torch.linalg.matrix_norm(w_q.double() @ w_k.T.double()) ** 2
    explicit = float(squares) ** 0.5
    assert coupling(q, k, width).item() == pytest.approx(explicit, rel=1e-4)


def test_gains_of_the_norm_are_folded_in_when_asked():
    model = small_llama()
    plain = GateNorm(layers=1).scores(model)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            layer.input_layernorm.weight.fill_(number + 1.0)
    torch.testing.assert_close(GateNorm(layers=1).scores(model), plain)
    squares = torch.arange(1.0, 7.0) ** 2  # once for queries and once for keys
    torch.testing.assert_close(GateNorm(layers=1, gains=True).scores(model), plain * squares)


# A layer with W_Q = 0 is removed first ---------------------------------------------------------------


@pytest.mark.parametrize("gains", [False, True])
@pytest.mark.parametrize("number", [0, 3, 5])
def test_a_layer_without_queries_goes_first(number, gains):
    model = small_llama()
    with torch.no_grad():
        model.model.layers[number].self_attn.q_proj.weight.zero_()
    adapter = attlas.make("gate-norm", layers=1, gains=gains)
    with adapter.inject(model):
        assert adapter.removed == [number]


# The converted model's logits equal those with the layer's attention output zeroed ------------------


@pytest.mark.parametrize("removed", [[0], [3], [0, 1, 5], [1, 2, 3, 4, 5]])
def test_logits_are_those_with_the_output_zeroed(removed):
    model, ids = small_llama(), prompt(24, 2)
    with Given(removed).inject(model):
        assert torch.equal(logits(model, ids), logits(zeroed(removed), ids))
        ours, theirs = continued(model, ids), continued(zeroed(removed), ids)
    torch.testing.assert_close(ours, theirs)


def test_biases_of_qwen2_go_with_the_layer():
    torch.manual_seed(0)
    model, ids = Qwen2ForCausalLM(Qwen2Config(**SIZES)).double().eval(), prompt(12, 2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
    adapter = attlas.make("gate-norm", share=0.5)
    with adapter.inject(model):
        found = logits(model, ids)
    assert len(adapter.removed) == 2
    with torch.no_grad():
        for number in adapter.removed:
            model.model.layers[number].self_attn.o_proj.weight.zero_()
    assert torch.equal(found, logits(model, ids))


def test_a_saved_choice_is_kept_whatever_the_scores_are_now(tmp_path):
    model = small_llama()
    adapter = attlas.make("gate-norm", layers=2)
    adapter.inject(model)
    path = adapter.save(tmp_path / "difference.safetensors")
    other, ids = small_llama(), prompt(24, 2)
    with torch.no_grad():  # a layer that would go first now
        last = max(set(range(6)) - set(adapter.removed))
        other.model.layers[last].self_attn.q_proj.weight.zero_()
        zeroed_too = zeroed(adapter.removed)
        zeroed_too.model.layers[last].self_attn.q_proj.weight.zero_()
    assert Adapter.load(path, other).removed == adapter.removed
    assert torch.equal(logits(other, ids), logits(zeroed_too, ids))


# Caches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [[0], [0, 1], [2, 5]])
def test_removed_layers_hold_no_keys_and_others_keep_their_slots(removed):
    model, ids = small_llama(), prompt(24, 2)
    full = logits(model, ids, use_cache=True)
    whole = cache_of(model(ids, use_cache=True))
    with Given(removed).inject(model):
        cache = cache_of(model(ids, use_cache=True))
        assert full.shape == logits(model, ids).shape
    assert cache_bytes(cache) == cache_bytes(whole) * (6 - len(removed)) // 6
    for number, layer in enumerate(cache.layers):
        assert isinstance(layer, NoKeys) == (number in removed)
        assert number in removed or layer.keys.shape[-2] == 24
    assert cache.get_seq_length() == 24  # asked of layer 0, removed or not


@pytest.mark.parametrize("window", [None, 6])
def test_sliding_windows_decode_as_one_pass(window):
    torch.manual_seed(0)
    config = Qwen2Config(
        **SIZES, sliding_window=6, use_sliding_window=True,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    model, ids = Qwen2ForCausalLM(config).double().eval(), prompt(20, 2)
    with Given([0] if window else [1]).inject(model):
        whole, cache = logits(model, ids), DynamicCache(config=config)
        pieces = [
            logits(model, p, **with_cache(model, cache)) for p in ids.split([9, 1, 1, 9], dim=1)
        ]
        torch.testing.assert_close(torch.cat(pieces, 1), whole)


def test_the_last_layer_of_a_type_is_not_removed():
    config = Qwen2Config(
        **SIZES, sliding_window=6, use_sliding_window=True,
        layer_types=["sliding_attention"] + ["full_attention"] * 3,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="no layer of sliding_attention"):
        Given([0]).inject(model)
    assert [type(m) for m in model.modules()] == before


def test_a_cache_cropped_goes_on():
    model, ids = small_llama(), prompt(24, 2)
    with Given([0, 3]).inject(model):
        cache = DynamicCache(config=model.config)
        whole = logits(model, ids, **with_cache(model, cache))
        cache.crop(-5)
        again = logits(model, ids[:, 19:], **with_cache(model, cache))
    torch.testing.assert_close(again, whole[:, 19:])


def test_a_cache_that_lacks_a_layer_is_refused_by_the_whole_model():
    model, ids = small_llama(), prompt(24, 2)
    with Given([0]).inject(model):
        cache = cache_of(model(ids, use_cache=True))
    with pytest.raises(ValueError, match="read the prompt anew"):
        model(ids, **with_cache(model, cache))


@pytest.mark.parametrize("removed", [[0], [0, 3]])
@pytest.mark.parametrize("part", ["snapkv", "streaming-llm", "quantized-cache", "quest-page-selection"])
def test_parts_attach_as_to_the_zeroed_model(part, removed):
    ids, options = prompt(24, 2), dict(attlas.catalog.registry.find(part).example)
    found = []
    for model in (small_llama(), zeroed(removed)):
        if not found:
            Given(removed).inject(model)
        with attlas.attach(model, attlas.make(part, **options)):
            found.append(continued(model, ids))
    torch.testing.assert_close(*found)


# Options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "layers"), ({"layers": 1, "share": 0.1}, "layers"), ({"layers": -1}, "layers"),
        ({"layers": 1.5}, "layers"), ({"layers": True}, "layers"), ({"share": 1.0}, "share"),
        ({"share": -0.1}, "share"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(options, named):
    with pytest.raises((ValueError, TypeCheckError), match=named):  # types are checked in tests
        attlas.make("gate-norm", **options)


def test_one_layer_keeps_attention():
    with pytest.raises(ValueError, match="at least one"):
        attlas.make("gate-norm", layers=6).inject(small_llama())


def test_a_body_without_its_head_is_converted_too():
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).model.eval()
    ids = prompt(12)
    with Given([0]).inject(model):
        found = model(ids).last_hidden_state
    with torch.no_grad():
        model.layers[0].self_attn.o_proj.weight.zero_()
    assert torch.equal(found, model(ids).last_hidden_state)


# Removing 3 of 30 layers by score costs less Shakespeare loss than the mean of five random choices -


def test_on_smollm2_it_removes_better_than_chance(smollm2):
    model, tokenizer = smollm2
    pieces = held_out(tokenizer, 128, 64)
    adapter = attlas.make("gate-norm", layers=3)
    with adapter.inject(model):
        ours = judged(model, pieces).value
    rng, others = random.Random(0), []
    for _ in range(5):
        with Given(sorted(rng.sample(range(30), 3))).inject(model):
            others.append(torch.tensor(judged(model, pieces).value).log().item())
    assert torch.tensor(ours).log().item() < fmean(others)
