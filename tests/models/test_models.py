"""Encoders, image classifiers and encoder–decoders; what importing attlas leaves alone."""

import subprocess
import sys

import pytest
import torch
import transformers as hf

import attlas

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
IDS = torch.arange(3, 21).reshape(2, 9)


def test_encoder_heads_learn_and_load(tmp_path):
    from attlas.models.encoder import EncoderForMaskedLM, EncoderForSequenceClassification

    config = attlas.EncoderConfig(vocab_size=50, attention="sinkformer", num_labels=3, **SIZES)
    for kind, labels in ((EncoderForMaskedLM, IDS), (EncoderForSequenceClassification, IDS[:, 0] % 3)):
        model = kind(config).eval()
        model(IDS, labels=labels).loss.backward()
        model.save_pretrained(tmp_path / kind.__name__)
        loaded = kind.from_pretrained(tmp_path / kind.__name__)
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert type(hf.AutoModel.from_config(config)) is attlas.Encoder


def test_encoder_ignores_padding():
    model = attlas.Encoder(attlas.EncoderConfig(vocab_size=50, **SIZES)).eval()
    mask = torch.ones_like(IDS)
    mask[:, 6:] = 0
    short = model(IDS[:, :6]).last_hidden_state
    torch.testing.assert_close(model(IDS, attention_mask=mask).last_hidden_state[:, :6], short)


def test_vit_learns_and_loads(tmp_path):
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 5}
    model, images = attlas.ViT(attlas.ViTConfig(**sizes, **SIZES)).eval(), torch.randn(2, 1, 8, 8)
    model(images, labels=torch.tensor([0, 4])).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(images).logits, model(images).logits)
    with pytest.raises(ValueError, match="pixel_values"):
        model(images[..., :4])
    with pytest.raises(ValueError, match="patch_size"):
        attlas.ViTConfig(image_size=8, patch_size=3)


@pytest.mark.parametrize("attention", ["softmax", "differential-transformer"])
def test_seq2seq_generates_with_a_cache_and_loads(attention, tmp_path):
    model = attlas.Seq2Seq(attlas.Seq2SeqConfig(vocab_size=50, attention=attention, **SIZES)).eval()
    mask = torch.ones_like(IDS)
    mask[0, 6:] = 0
    for beams in (1, 3):
        options = {"attention_mask": mask, "max_new_tokens": 5, "num_beams": beams, "do_sample": False}
        cached = model.generate(IDS, **options)
        assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))
    model(IDS, labels=IDS).loss.backward()
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS, labels=IDS).logits, model(IDS, labels=IDS).logits)


def test_cross_attention_needs_a_cross_form():
    config = {"vocab_size": 50, "attention": "rope-nope-hybrid", **SIZES}
    with pytest.raises(ValueError, match="cross form"):
        attlas.Seq2Seq(attlas.Seq2SeqConfig(**config))
    attlas.Seq2Seq(attlas.Seq2SeqConfig(**config, cross_attention="softmax"))


def test_importing_attlas_registers_nothing():
    code = "import attlas, sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
