"""What models, configurations and tokenizers are made of.

Three private names are left, all of them what Transformers asks a model's author to set or to heed:
`_no_split_modules` and `_tied_weights_keys` are attributes of every model, declared in
`attlas.models`; `_is_hf_initialized` marks weights that a checkpoint has filled, here alone.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ImageClassifierOutput,
    MaskedLMOutput,
    Seq2SeqLMOutput,
    SequenceClassifierOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
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
    "BaseModelOutputWithPast",
    "CausalLMOutputWithPast",
    "GenerationMixin",
    "GradientCheckpointingLayer",
    "ImageClassifierOutput",
    "LlamaConfig",
    "LlamaForCausalLM",
    "MaskedLMOutput",
    "PreTrainedModel",
    "PretrainedConfig",
    "Seq2SeqLMOutput",
    "SequenceClassifierOutput",
    "can_return_tuple",
    "is_initialized",
    "mark_initialized",
    "quiet",
]


def is_initialized(parameter: Any) -> bool:
    """Whether a checkpoint has filled a parameter."""
    return getattr(parameter, "_is_hf_initialized", False)


def mark_initialized(parameter: Any) -> None:
    """Keep Transformers' initialisation away from a parameter or a module."""
    parameter._is_hf_initialized = True


def quiet() -> None:
    """No progress bars while models are loaded."""
    logging.disable_progress_bar()
