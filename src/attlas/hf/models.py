"""What models, configurations and tokenizers are made of.

Three private names are left, all of them what Transformers asks a model's author to set or to heed:
`_no_split_modules` and `_tied_weights_keys` are attributes of every model, declared in
`attlas.models`; `_is_hf_initialized` marks weights that a checkpoint has filled, here alone.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    initialization,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithNoAttention,
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ImageClassifierOutput,
    ImageClassifierOutputWithNoAttention,
    MaskedLMOutput,
    Seq2SeqLMOutput,
    SequenceClassifierOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from transformers.utils import can_return_tuple, logging

__all__ = [
    "ROPE_INIT_FUNCTIONS",
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoTokenizer",
    "BaseModelOutput",
    "BaseModelOutputWithNoAttention",
    "BaseModelOutputWithPast",
    "CausalLMOutputWithPast",
    "Conv1D",
    "Dinov2Config",
    "Dinov2Model",
    "GenerationMixin",
    "GradientCheckpointingLayer",
    "ImageClassifierOutput",
    "ImageClassifierOutputWithNoAttention",
    "LlamaConfig",
    "LlamaForCausalLM",
    "MaskedLMOutput",
    "PreTrainedModel",
    "PreTrainedTokenizerFast",
    "PretrainedConfig",
    "Seq2SeqLMOutput",
    "SequenceClassifierOutput",
    "can_return_tuple",
    "config_class",
    "initialization",
    "is_initialized",
    "logging",
    "mark_initialized",
    "quiet",
]


def config_class(name: str) -> Any:
    """The class of configurations called `name`, such as "LlamaConfig"."""
    return getattr(transformers, name)


def is_initialized(parameter: Any) -> bool:
    """Whether a checkpoint has filled a parameter."""
    return getattr(parameter, "_is_hf_initialized", False)


def mark_initialized(parameter: Any) -> None:
    """Keep Transformers' initialisation away from a parameter or a module."""
    parameter._is_hf_initialized = True


def quiet() -> None:
    """No progress bars while models are loaded."""
    logging.disable_progress_bar()
