"""Transformers' own tests on our models, and on its own as a yardstick."""

from __future__ import annotations

import copy
import unittest
from typing import Any, ClassVar

import transformers
from testers import TEXT, Images, SourceAndTarget, Tester
from tests.generation.test_utils import GenerationTesterMixin
from tests.test_modeling_common import ModelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin

import attlas
from attlas.models.decoder import DecoderModel
from attlas.models.encoder import EncoderForMaskedLM, EncoderForSequenceClassification
from attlas.models.vit import ViTModel

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}


class Base(ModelTesterMixin):
    """A tester made anew for each test."""

    tester: ClassVar[Any]
    pipeline_model_mapping: ClassVar[dict[str, Any]] = {}

    @property
    def model_tester(self) -> Any:
        return self._made

    def setUp(self) -> None:
        self._made = type(self).tester()


class Generative(Base, GenerationTesterMixin, TrainingTesterMixin):
    """A decoder."""


class Decoder(Generative):
    all_model_classes = (DecoderModel, attlas.Decoder)
    attention: Any = "softmax"

    def setUp(self) -> None:
        self._made = Tester(attlas.DecoderConfig, attention=self.attention, **TEXT)
        self._made.causal_lm_class = attlas.Decoder


class SoftmaxDecoderTest(Decoder, unittest.TestCase):
    pass


class Stateful(Decoder):
    """A decoder with layers whose cache is a state."""

    def _check_past_key_values_for_generate(
        self, batch_size: int, past_key_values: Any, seq_length: int, config: Any
    ) -> None:
        assert past_key_values.get_seq_length() == seq_length
        assert past_key_values.layers[0].keys is None
        assert all(len(x) == batch_size for x in past_key_values.layers[0].states.values())


class RecurrentDecoderTest(Stateful, unittest.TestCase):
    attention = "lightning-attention-2"


class HybridDecoderTest(Stateful, unittest.TestCase):
    attention = ("gated-linear-attention", "softmax")


class DifferentialDecoderTest(Decoder, unittest.TestCase):
    attention = "differential-transformer"

    def _check_past_key_values_for_generate(
        self, batch_size: int, past_key_values: Any, seq_length: int, config: Any
    ) -> None:
        config = copy.deepcopy(config)
        config.head_dim *= 2  # the keys of both maps lie side by side
        super()._check_past_key_values_for_generate(batch_size, past_key_values, seq_length, config)


class EncoderTest(Base, unittest.TestCase):
    all_model_classes = (attlas.Encoder, EncoderForMaskedLM, EncoderForSequenceClassification)
    tester = staticmethod(lambda: Tester(attlas.EncoderConfig, **TEXT))


class ViTTest(Base, unittest.TestCase):
    all_model_classes = (ViTModel, attlas.ViT)
    test_resize_embeddings = False
    tester = staticmethod(lambda: Images(attlas.ViTConfig, 4, **VIT))


class Seq2SeqTest(Base, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (attlas.Seq2Seq,)
    is_encoder_decoder = True
    tester = staticmethod(lambda: SourceAndTarget(attlas.Seq2SeqConfig, **TEXT))

    def _check_past_key_values_for_generate(
        self, batch_size: int, past_key_values: Any, seq_length: int, config: Any
    ) -> None:
        own = past_key_values.self_attention_cache  # cross-attention keeps nothing
        super()._check_past_key_values_for_generate(batch_size, own, seq_length, config)


# Transformers' own, by the same testers.


class LlamaTest(Generative, unittest.TestCase):
    all_model_classes = (transformers.LlamaModel, transformers.LlamaForCausalLM)

    def setUp(self) -> None:
        self._made = Tester(transformers.LlamaConfig, **TEXT)
        self._made.causal_lm_class = transformers.LlamaForCausalLM


class BertTest(Base, unittest.TestCase):
    all_model_classes = (
        transformers.BertModel, transformers.BertForMaskedLM,
        transformers.BertForSequenceClassification,
    )  # fmt: skip
    tester = staticmethod(lambda: Tester(transformers.BertConfig, **TEXT))


class HFViTTest(Base, unittest.TestCase):
    all_model_classes = (transformers.ViTModel, transformers.ViTForImageClassification)
    test_resize_embeddings = False
    tester = staticmethod(lambda: Images(transformers.ViTConfig, 5, **VIT))


class BartTest(Base, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (transformers.BartForConditionalGeneration,)
    is_encoder_decoder = True
    tester = staticmethod(lambda: SourceAndTarget(
        transformers.BartConfig, vocab_size=99, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=37, decoder_ffn_dim=37,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    ))  # fmt: skip
