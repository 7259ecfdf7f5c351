"""Small random models of the kinds that attach must work on."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

VOCABULARY = 97
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROTARY = {**BASE, "head_dim": 16}
ENCODER = {key: BASE[key] for key in BASE if not key.startswith(("num_key", "max", "bos", "eos"))}

CONFIGS: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**BASE),
    "qwen2": lambda: hf.Qwen2Config(**BASE),
    "qwen3": lambda: hf.Qwen3Config(**ROTARY),
    "mistral": lambda: hf.MistralConfig(**ROTARY, sliding_window=None),
    "mistral-window": lambda: hf.MistralConfig(**ROTARY, sliding_window=8),
    "gemma2": lambda: hf.Gemma2Config(
        **ROTARY, query_pre_attn_scalar=16, sliding_window=8, attn_logit_softcapping=1.0
    ),
    "gemma3": lambda: hf.Gemma3TextConfig(
        **ROTARY,
        query_pre_attn_scalar=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gpt-oss": lambda: hf.GptOssConfig(
        **ROTARY,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "gpt-neox": lambda: hf.GPTNeoXConfig(
        **{k: v for k, v in BASE.items() if k != "num_key_value_heads"}, rotary_pct=0.5
    ),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=64,
        n_layer=4,
        n_head=4,
        n_positions=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
DECODERS = tuple(CONFIGS)
EAGER = ("gemma2", "gpt-oss")


def decoder(kind: str, attention: str | None = None) -> Any:
    """A causal language model of a kind in CONFIGS; SDPA refuses soft caps and drops sinks."""
    torch.manual_seed(0)
    attention = attention or ("eager" if kind in EAGER else "sdpa")
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation=attention)
    for name, weight in model.named_parameters():
        if "sinks" in name:  # they start at whatever memory holds
            torch.nn.init.normal_(weight)
        elif weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)  # wide, so that attention is no mere mean
        elif "norm" in name:  # uneven, so that normalised keys differ in length
            weight.data.add_(0.5 * torch.randn_like(weight))
    return model.eval()


def bert(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = hf.BertConfig(**ENCODER, max_position_embeddings=512, initializer_range=0.3)
    return hf.BertModel._from_config(config, attn_implementation=attention).eval()


def vit(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = hf.ViTConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        initializer_range=0.3,
    )
    return hf.ViTModel._from_config(config, attn_implementation=attention).eval()


def prompt(batch: int = 2, tokens: int = 24, seed: int = 1) -> torch.Tensor:
    """Tokens; distinct in a row where it is short, since repeated ones tie in the first layer."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(VOCABULARY - 3, generator=generator) + 3 for _ in range(batch)]
    return torch.stack(rows).repeat(1, -(-tokens // (VOCABULARY - 3)))[:, :tokens]


def greedy(model: Any, ids: torch.Tensor, count: int = 10, **options: Any) -> list[list[int]]:
    """Greedy tokens of generate()."""
    out = model.generate(
        ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, **options
    )
    return out[:, ids.shape[1] :].tolist()
