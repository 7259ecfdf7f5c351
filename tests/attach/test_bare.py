"""Attached without parts, a model is itself; left, it has no trace of attlas."""

import copy

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny_models
from attlas.attach import Part, attach
from attlas.contract import families


class Nothing(Part):
    """Forces the path of parts without changing anything."""

    def observe(self, call):
        pass


@pytest.mark.parametrize("parts", [(), (Nothing(),)], ids=["bare", "part"])
@pytest.mark.parametrize("kind", [family.name for family in families.FAMILIES])
def test_is_the_model(kind, parts):
    ids = tiny_models.prompt()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    model = tiny_models.decoder(kind)
    with torch.no_grad():
        plain = model(ids).logits
        padded = model(ids, attention_mask=mask).logits
        tokens = tiny_models.greedy(model, ids, attention_mask=mask)
        model = tiny_models.decoder(kind)  # the first may have kept frequencies for its length
        with attach(model, *parts):
            bound = 2e-5 * plain.abs().max() if families.find(kind).eager else 0
            assert (model(ids).logits - plain).abs().max() <= bound
            assert (model(ids, attention_mask=mask).logits - padded)[
                mask.bool()
            ].abs().max() <= bound
            assert tiny_models.greedy(model, ids, attention_mask=mask) == tokens


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 20},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "prefill_chunk_size": 7},
    ],
    ids=["greedy", "sampling", "beam", "chunks"],
)
def test_generates_as_the_model(options):
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt()
    torch.manual_seed(3)
    expected = model.generate(ids, max_new_tokens=8, **options)
    torch.manual_seed(3)
    with attach(model):
        assert torch.equal(model.generate(ids, max_new_tokens=8, **options), expected)


def test_encoders_are_themselves():
    bert, ids = tiny_models.bert(), tiny_models.prompt()
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    vit, pixels = tiny_models.vit(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = bert(ids, attention_mask=mask)[0], vit(pixels)[0]
        with attach(bert), attach(vit, Nothing()):
            assert torch.equal(bert(ids, attention_mask=mask)[0], expected[0])
            assert torch.equal(vit(pixels)[0], expected[1])


def test_position_bias_is_honoured():
    config = transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(config).eval()
    ids = tiny_models.prompt()
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask)[0]
        with attach(model):
            assert torch.equal(model(ids, attention_mask=mask)[0], expected)


def snapshot(model):
    return (
        [copy.deepcopy(m.config.__dict__) for m in model.modules() if hasattr(m, "config")],
        [(len(m._forward_pre_hooks), len(m._forward_hooks), dict(m.__dict__).keys())
         for m in model.modules()],
        dict(AttentionInterface._global_mapping), dict(ALL_ATTENTION_FUNCTIONS._local_mapping),
        dict(AttentionMaskInterface._global_mapping),
        dict(ALL_MASK_ATTENTION_FUNCTIONS._local_mapping),
    )  # fmt: skip


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_leaves_no_trace(implementation):
    model = tiny_models.decoder("llama", implementation)
    before = snapshot(model)
    with attach(model, Nothing(), record=["entropy"]):
        tiny_models.greedy(model, tiny_models.prompt())
    assert snapshot(model) == before

    class Fails(Part):
        def observe(self, call):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), attach(model, Fails()):
        model(tiny_models.prompt())
    assert snapshot(model) == before


def test_restores_each_part_of_a_mixed_model():
    """Vision and text may have implementations of their own; vision keeps its own while attached."""
    text = families.find("gemma3").config()
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=4,
    )  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4
    )
    model = transformers.Gemma3ForConditionalGeneration._from_config(
        config, attn_implementation={"text_config": "sdpa", "vision_config": "eager"}
    ).eval()
    before = snapshot(model)
    ids = tiny_models.prompt()
    with torch.no_grad():
        expected = model(ids).logits
        with attach(model) as session:
            assert config.vision_config._attn_implementation == "eager"
            assert config.text_config._attn_implementation == "attlas"
            assert torch.equal(model(ids).logits, expected)
            assert session.kv_bytes > 0
    assert snapshot(model) == before


def test_two_models_at_once():
    one, two = tiny_models.decoder("llama"), tiny_models.decoder("qwen2")
    ids = tiny_models.prompt()
    expected = one(ids).logits, two(ids).logits
    with attach(one, record=["entropy"]) as first:
        with attach(two, record=["entropy"]) as second:
            assert torch.equal(one(ids).logits, expected[0])
            assert torch.equal(two(ids).logits, expected[1])
        assert torch.equal(one(ids).logits, expected[0])
    assert first["entropy"].shape == second["entropy"].shape
    assert not torch.equal(first["entropy"], second["entropy"])
    assert "attlas" not in ALL_ATTENTION_FUNCTIONS


def test_training_goes_through():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt()
    model(ids, labels=ids).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with attach(model, Nothing()):
        model(ids, labels=ids).loss.backward()
    for gradient, parameter in zip(expected, model.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)
