"""Small random models that attach must work on, and what tests ask of them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from attlas.contract.families import SIZES, find

VOCABULARY: int = SIZES["vocab_size"]
ENCODER = {key: SIZES[key] for key in SIZES if not key.startswith(("num_key", "max", "bos", "eos"))}


def decoder(kind: str, attention: str | None = None) -> Any:
    """A causal language model of a family, see `attlas.contract.families`."""
    return find(kind).model(attention)


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
