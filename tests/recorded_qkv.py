"""Queries, keys and values as a pretrained model's attention meets them."""

import random
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attlas.tasks.text import passage
from real_models import fetched


@cache
def recorded(tokens: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(q, k, v) of every layer of SmolLM2 over so many tokens of English; skips where it is not."""
    model, tokenizer = fetched("smollm2")
    found = []

    def record(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Any:
        found.append((q.float(), k.float(), v.float()))
        return sdpa_attention_forward(module, q, k, v, *args, **options)

    AttentionInterface.register("recorded", record)
    before = model.config._attn_implementation
    model.set_attn_implementation("recorded")
    ids = tokenizer(passage(random.Random(0), 8 * tokens), return_tensors="pt")["input_ids"][:, :tokens]
    assert ids.shape[1] == tokens
    with torch.no_grad():
        model(ids, use_cache=False)
    model.set_attn_implementation(before)
    return found
