"""A decoder of two layers that learns induction in seconds: a random string, and again from the start."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import attlas

VOCABULARY, HALF = 24, 10


def strings(rows: int, generator: torch.Generator) -> Tensor:
    """Different symbols in random order, twice, [rows, 2 · HALF]."""
    order = torch.rand(rows, VOCABULARY, generator=generator).argsort(dim=1)[:, :HALF]
    return torch.cat([order, order], dim=1)


def asked(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Logits of the second string's tokens behind its first."""
    return model(input_ids=ids[:, :-1]).logits[:, HALF:]


def accuracy(model: torch.nn.Module, ids: Tensor) -> float:
    """Share of next symbols that are told."""
    with torch.no_grad():
        right = asked(model, ids).argmax(-1) == ids[:, HALF + 1 :]
    return float(right.float().mean())


@cache
def trained(seed: int = 0, steps: int = 500) -> attlas.Decoder:
    """Heads of one layer read the token before, those of the next what stood behind its like."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config = attlas.DecoderConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=2 * HALF, initializer_range=0.1,
    )  # fmt: skip
    model = attlas.Decoder(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        ids = strings(64, generator)
        loss = cross_entropy(asked(model, ids).mT, ids[:, HALF + 1 :])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()
