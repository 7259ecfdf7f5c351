"""Decoders of every layer: generation with a cache, saving, training, and what is refused."""

import json

import pytest
import torch
import transformers as hf

import attlas
from attlas.catalog import registry
from attlas.catalog.kinds import LAYER
from attlas.hf.caches import cache_of, with_cache

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LAYERS = [e for e in registry.entries(LAYER) if issubclass(e.object, attlas.Attention)]


def decoder(attention="softmax", **options):
    torch.manual_seed(0)
    config = attlas.DecoderConfig(
        **{**SIZES, **options}, attention=attention, pad_token_id=0, initializer_range=0.3
    )
    return attlas.Decoder(config).eval()


def of_entry(entry):
    example = {k: v for k, v in entry.example.items() if k != "dim"}
    sizes = {"num_attention_heads": example.pop("heads", 4)}
    if "kv_heads" in example:
        sizes["num_key_value_heads"] = example.pop("kv_heads")
    return decoder(entry.name, attention_options=example, **sizes)


def prompt(tokens=9, padded=3):
    ids = torch.randint(3, 50, (2, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return ids, mask


def generate(model, ids, mask, **options):
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=5, **{"do_sample": False, **options}
    )


@pytest.mark.parametrize("entry", LAYERS, ids=lambda e: e.name)
def test_generates_with_a_cache_what_it_generates_without(entry):
    if not entry.object.supports.causal:
        pytest.skip(f"{entry.name} has no causal form")
    model, (ids, mask) = of_entry(entry), prompt()
    for options in ({}, {"num_beams": 2}):
        cached = generate(model, ids, mask, **options)
        assert torch.equal(cached, generate(model, ids, mask, use_cache=False, **options))


@pytest.mark.parametrize("entry", LAYERS, ids=lambda e: e.name)
def test_loads_to_the_bit(entry, tmp_path):
    if not entry.object.supports.causal:
        pytest.skip(f"{entry.name} has no causal form")
    model, (ids, mask) = of_entry(entry), prompt()
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is attlas.Decoder
    assert torch.equal(
        loaded(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits
    )


@pytest.mark.parametrize("position", ["none", "learned", "sinusoidal", "alibi", "t5", "rope"])
def test_positions_load_to_the_bit(position, tmp_path):
    model, (ids, mask) = decoder(position=position, rope_theta=500.0), prompt()
    model.save_pretrained(tmp_path)
    loaded = attlas.Decoder.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(generate(loaded, ids, mask), generate(model, ids, mask, use_cache=False))


def test_steps_equal_the_whole():
    model, (ids, _) = decoder(), prompt()
    whole, cache = model(ids).logits, None
    for at in range(ids.shape[1]):
        out = model(ids[:, at : at + 1], **with_cache(model, cache), use_cache=True)
        cache = cache_of(out)
        torch.testing.assert_close(out.logits[:, 0], whole[:, at], rtol=1e-4, atol=1e-4)


def test_left_padding_changes_nothing():
    model, (ids, mask) = decoder(["window", "softmax"], sliding_window=4), prompt()
    alone = model.generate(ids[:1, 3:], max_new_tokens=5, do_sample=False)[:, -5:]
    assert torch.equal(generate(model, ids, mask)[:1, -5:], alone)


def test_window_layers_see_a_window_and_slide_in_the_cache():
    model, (ids, _) = decoder("window", sliding_window=4, num_hidden_layers=1), prompt()
    changed = ids.clone()
    changed[:, 0] = 3 + (ids[:, 0] - 2) % 40
    a, b = model(ids).logits, model(changed).logits
    assert torch.equal(a[:, 4:], b[:, 4:])
    assert not torch.equal(a[:, 3], b[:, 3])
    cache = cache_of(model(ids, use_cache=True))
    assert cache.layers[0].keys.shape[2] == 3


def test_samples_and_static_caches():
    model, (ids, mask) = decoder(), prompt()
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(generate(model, ids, mask, do_sample=True))
    assert torch.equal(*runs)
    static = generate(model, ids, mask, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, generate(model, ids, mask))


def test_pattern_repeats_and_holds_options():
    pattern = ["window", {"name": "differential-transformer", "depth": 5}]
    model = decoder(pattern, num_hidden_layers=4, sliding_window=3)
    kinds = [type(block.attention).__name__ for block in model.model.layers]
    assert kinds == ["Attention", "Differential"] * 2
    assert [block.attention.layer_idx for block in model.model.layers] == [0, 1, 2, 3]
    assert json.loads(model.config.to_json_string())["attention"] == pattern
    options = decoder(["softmax", "differential"], attention_options={"depth": 7})
    assert options.model.layers[1].attention.lambda_init == pytest.approx(
        0.8 - 0.6 * 2.718281828**-2.1
    )


@pytest.mark.parametrize("last", [["softmax"], ["arwkv-rwkv7"], ["window"]])
def test_hybrids_generate_with_states_beside_keys_what_they_generate_without_a_cache(last):
    pattern = ["lightning-attention-2"] * 3 + last
    model, (ids, mask) = decoder(pattern, num_hidden_layers=4, sliding_window=4), prompt()
    for options in ({}, {"num_beams": 2}):
        cached = generate(model, ids, mask, **options)
        assert torch.equal(cached, generate(model, ids, mask, use_cache=False, **options))
    cache = cache_of(model(ids, use_cache=True))
    assert [layer.keys is None for layer in cache.layers] == [True] * 3 + [last == ["arwkv-rwkv7"]]
    assert cache.get_seq_length() == 9


def checkpoint(model, reentrant):
    """Switch checkpointing on, by its newer name where there is one."""
    older = getattr(model, "gradient_checkpointing_enable", None)
    getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": reentrant})


def test_reentrant_checkpointing_refuses_to_lose_an_auxiliary_loss():
    model, (ids, _) = decoder("mixture-of-head").train(), prompt()
    checkpoint(model, reentrant=True)
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant"):
        model(ids, labels=ids)


@pytest.mark.parametrize(
    ("attention", "reentrant"),
    [("softmax", True), ("softmax", False), ("mixture-of-head", False)],
)
def test_gradient_checkpointing_gives_the_same_gradients(attention, reentrant):
    grads = []
    for checkpointing in (False, True):
        model, (ids, mask) = decoder(attention).train(), prompt()
        if checkpointing:
            checkpoint(model, reentrant)
            model.enable_input_require_grads()
        loss = model(ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name])


def test_auxiliary_losses_are_added_in_training_alone():
    model, (ids, _) = decoder("mixture-of-head"), prompt()
    plain = model(ids, labels=ids).loss
    trained = model.train()(ids, labels=ids).loss
    extra = sum(block.attention.auxiliary_loss for block in model.model.layers)
    assert extra > 0
    torch.testing.assert_close(trained, plain + extra)


def test_embeddings_are_tied_or_not():
    tied, free = decoder(), decoder(tie_word_embeddings=False)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert free.lm_head.weight is not free.model.embed_tokens.weight


def test_half_precision_keeps_the_frequencies(tmp_path):
    model = decoder()
    model.save_pretrained(tmp_path)
    half = attlas.Decoder.from_pretrained(tmp_path, dtype=torch.bfloat16)
    encoding = half.model.layers[0].attention.position_encoding
    assert half.model.layers[0].attention.q_proj.weight.dtype == torch.bfloat16
    assert torch.equal(
        encoding.frequencies, model.model.layers[0].attention.position_encoding.frequencies
    )


def test_missing_parameters_begin_as_the_mechanism_says(tmp_path):
    model = decoder("differential-transformer")
    weights = {
        k: v for k, v in model.state_dict().items() if "lambda" not in k and k != "lm_head.weight"
    }
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded = attlas.Decoder.from_pretrained(tmp_path)
    new = loaded.model.layers[0].attention.lambda_q1
    assert 0 < new.abs().max() < 1
    assert torch.equal(
        loaded.model.layers[0].attention.q_proj.weight,
        model.model.layers[0].attention.q_proj.weight,
    )


def test_mechanisms_initialise_themselves():
    model = decoder("mixture-of-head", num_attention_heads=4).model
    assert model.layers[0].mlp.up_proj.weight.std() > 0.2
    torch.manual_seed(0)
    layer = decoder().model.layers[0].attention
    assert layer.q_proj.weight.abs().max() <= 32**-0.5  # torch's own, uniform


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attention": "sofmax"}, "sofmax"),
        ({"attention": ["softmax"] * 3}, "does not divide"),
        ({"attention": []}, "does not divide"),
        ({"attention": "window"}, "sliding_window"),
        ({"attention": "snapkv"}, "snapkv"),
        ({"attention": {"size": 3}}, "name"),
        ({"attention": 7}, "7"),
        ({"attention_options": {"depht": 3}}, "depht"),
        ({"attention_options": {"dim": {1}}}, "JSON"),
        ({"attention": {"name": "softmax", "depht": 3}}, "depht"),
        ({"attention": "sinkformer"}, "causal form"),
        ({"attention": "rope-nope-hybrid", "position": "rope"}, "position"),
        ({"num_key_value_heads": 3}, "kv_heads"),
        ({"num_attention_heads": 5}, "heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"position": "rotary"}, "rotary"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, said):
    with pytest.raises(ValueError, match=said):
        attlas.Decoder(attlas.DecoderConfig(**{**SIZES, **options}))


def test_other_checkpoints_are_refused_by_name(tmp_path):
    decoder().save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=r"softmax.*differential"):
        attlas.Decoder.from_pretrained(tmp_path / "ours", attention="differential-transformer")
    hf.LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="llama"):
        attlas.Decoder.from_pretrained(tmp_path / "llama")
