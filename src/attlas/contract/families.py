"""Families of language models, as data: what parts must work on, and what is special about each.

    for name in distinct("soft-caps", "sinks"):          # one family of every combination of the two
        model = find(name).model()

A test says which traits matter to it and runs on one family of each combination that exists, so a family
added here is picked up by every test that it brings something new to, and by no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from attlas.errors import UnknownName

#: What is special about a family, and what that means for whoever attaches to it.
TRAITS = {
    "rotary": "queries and keys are rotated by their positions",
    "partial-rotary": "a share of their width is",
    "paired-rotary": "neighbouring channels are rotated together, not those half a width apart",
    "varying-rotary": "the frequencies change with the length of what is read",
    "growing-rotary": "they change with the longest text so far",
    "some-rotary": "some layers do not rotate",
    "grouped": "several query heads share a key head",
    "full": "some layers see the whole context",
    "windows": "some layers see a sliding window of it",
    "soft-caps": "logits are bent below a cap",
    "sinks": "logits of no key join each softmax",
    "key-norm": "keys are normalised before they are rotated",
    "biases": "projections add a bias",
    "states": "some layers keep states that they write into, in place of keys",
    "latents": "what is cached is no key; keys are made of it in every call",
    "shared-keys": "some layers have no keys and read those of others",
    "layouts": "heads are wider in some layers than in others",
}

#: Sizes of the small models; those of heads are 16 wide.
SIZES: Mapping[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One kind of decoder.

    Attributes:
        name: in tests and messages.
        config_class: in Transformers.
        traits: of `TRAITS`.
        options: of its configuration, under sizes that are asked for.
        renamed: sizes that its configuration calls otherwise, and None for those that it does not have.
        alternates: types of layers that are named in turn; none where they are not named.
    """

    name: str
    config_class: str
    traits: frozenset[str]
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    renamed: Mapping[str, str | None] = field(default_factory=dict, hash=False)
    alternates: tuple[str, ...] = ()

    def config(self, **sizes: Any) -> Any:
        """A configuration of small size, or of the sizes given."""
        from attlas.hf.models import config_class

        given = {**SIZES, **self.options, **sizes}
        named: dict[str, Any] = {}
        for size, value in given.items():
            name = self.renamed.get(size, size)
            if name is not None:
                named[name] = value
        if self.alternates:
            turns, count = self.alternates, given["num_hidden_layers"]
            named["layer_types"] = [turns[i % len(turns)] for i in range(count)]
        return config_class(self.config_class)(**named)

    @property
    def eager(self) -> bool:
        """Whether only eager attention is right: SDPA refuses soft caps and drops sinks."""
        return bool(self.traits & {"soft-caps", "sinks"})

    def model(self, attention: str | None = None, **sizes: Any) -> Any:
        """A small causal language model with random weights, in evaluation mode.

        Args:
            attention: its implementation; "sdpa" where that is right, else "eager".
            sizes: of the configuration, over `SIZES`.
        """
        from attlas.hf.models import AutoModelForCausalLM

        torch.manual_seed(0)
        attention = attention or ("eager" if self.eager else "sdpa")
        model = AutoModelForCausalLM.from_config(
            self.config(**sizes), attn_implementation=attention
        )
        for name, weight in model.named_parameters():
            if "sinks" in name:  # they start at whatever memory holds
                torch.nn.init.normal_(weight)
            elif weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.2)  # wide, so that attention is no mere mean
            elif "norm" in name:  # uneven, so that normalised keys differ in length
                weight.data.add_(0.5 * torch.randn_like(weight))
        return model.eval()


def _family(name: str, config_class: str, traits: str, **more: Any) -> Family:
    return Family(name, config_class, frozenset(traits.split()), **more)


_WIDE = {"head_dim": 16}
_MIXED = {**_WIDE, "sliding_window": 8}
_TURNS = ("sliding_attention", "full_attention")
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SHARED = {**_MIXED, "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8,
           "num_kv_shared_layers": 2}  # fmt: skip

#: Every family; of those alike in what matters to a test, the first is taken.
FAMILIES: tuple[Family, ...] = (
    _family("llama", "LlamaConfig", "rotary grouped full"),
    _family("qwen2", "Qwen2Config", "rotary grouped full biases"),
    _family("qwen3", "Qwen3Config", "rotary grouped full key-norm", options=_WIDE),
    _family("mistral", "MistralConfig", "rotary grouped full",
            options={**_WIDE, "sliding_window": None}),
    _family("mistral-window", "MistralConfig", "rotary grouped windows", options=_MIXED),
    _family("gemma3", "Gemma3TextConfig", "rotary grouped full windows key-norm",
            options={**_MIXED, "query_pre_attn_scalar": 16}, alternates=_TURNS),
    _family("gemma2", "Gemma2Config", "rotary grouped full windows soft-caps",
            options={**_MIXED, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 1.0}),
    _family("gpt-oss", "GptOssConfig", "rotary grouped full windows sinks biases",
            options={**_MIXED, "num_local_experts": 2, "num_experts_per_tok": 1}, alternates=_TURNS),
    _family("gpt-neox", "GPTNeoXConfig", "rotary partial-rotary full biases",
            options={"rotary_pct": 0.5}, renamed={"num_key_value_heads": None}),
    _family("smollm3", "SmolLM3Config", "rotary some-rotary grouped full",
            options={"no_rope_layers": [1, 0, 1, 0]}),
    _family("cohere2", "Cohere2Config", "rotary some-rotary paired-rotary grouped full windows",
            options=_MIXED, alternates=_TURNS),
    _family("glm", "GlmConfig", "rotary partial-rotary paired-rotary grouped full biases",
            options={**_WIDE, "partial_rotary_factor": 0.5}),
    _family("phi3-long", "Phi3Config", "rotary varying-rotary grouped full", options={
        "original_max_position_embeddings": 20, "rope_scaling": {
            "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
            "rope_theta": 10000.0, "original_max_position_embeddings": 20,
        },
    }),
    _family("olmo-dynamic", "OlmoConfig", "rotary varying-rotary growing-rotary grouped full", options={
        "max_position_embeddings": 20,
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    }),
    _family("gpt2", "GPT2Config", "full biases", renamed={
        "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions", "intermediate_size": None,
        "num_key_value_heads": None,
    }),
    _family("qwen3-next", "Qwen3NextConfig", "rotary partial-rotary grouped full key-norm states",
            options={**_WIDE, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16,
                     "linear_num_value_heads": 2, "linear_num_key_heads": 2,
                     "linear_key_head_dim": 8, "linear_value_head_dim": 8},
            alternates=("linear_attention", "full_attention")),
    _family("jamba", "JambaConfig", "grouped full states",
            options={"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
                     "num_experts_per_tok": 1, "mamba_d_state": 4}),
    _family("deepseek-v3", "DeepseekV3Config", "rotary partial-rotary full latents",
            options={**_EXPERTS, "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 16,
                     "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
                     "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
                     "n_group": 1, "topk_group": 1}),
    _family("gemma3n", "Gemma3nTextConfig", "rotary grouped full windows key-norm shared-keys",
            options={**_SHARED, "laurel_rank": 4}, alternates=_TURNS),
    _family("gemma4", "Gemma4TextConfig",
            "rotary grouped full windows key-norm shared-keys layouts",
            options={**_SHARED, "global_head_dim": 32}, alternates=_TURNS),
)  # fmt: skip


def find(name: str) -> Family:
    """The family called `name`.

    Raises:
        UnknownName: no such family.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise UnknownName("family of models", name, [family.name for family in FAMILIES])


def distinct(*traits: str, having: Iterable[str] = (), lacking: Iterable[str] = ()) -> list[str]:
    """Names of one family, the first, of each combination of traits that occurs.

    Args:
        traits: those that matter; families that differ in no other way are one.
        having: traits that a family must have.
        lacking: traits that it must not have.

    Raises:
        UnknownName: a trait that is not in `TRAITS`.
    """
    needed, barred = set(having), set(lacking)
    for trait in (*traits, *needed, *barred):
        if trait not in TRAITS:
            raise UnknownName("trait of models", trait, list(TRAITS))
    found: dict[frozenset[str], str] = {}
    for family in FAMILIES:
        if needed <= family.traits and not barred & family.traits:
            found.setdefault(family.traits & frozenset(traits), family.name)
    return list(found.values())
