"""A decoder of two layers that learns induction in seconds: random strings that come again and again.

Periods differ from row to row, so that no fixed distance tells the next symbol.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import attlas

VOCABULARY, LENGTH, PERIODS = 24, 20, (5, 10)
UNKNOWN = -100


def strings(rows: int, generator: torch.Generator, period: int | None = None) -> tuple[Tensor, Tensor]:
    """(ids [rows, LENGTH], the next symbols where they are known, UNKNOWN elsewhere)."""
    symbols = torch.rand(rows, VOCABULARY, generator=generator).argsort(dim=1)
    periods = torch.randint(PERIODS[0], PERIODS[1] + 1, (rows, 1), generator=generator)
    if period is not None:
        periods.fill_(period)
    ids = symbols.gather(1, torch.arange(LENGTH + 1) % periods)
    return ids[:, :-1], ids[:, 1:].masked_fill(torch.arange(LENGTH) < periods, UNKNOWN)


def accuracy(logits: Tensor, following: Tensor) -> float:
    """Share of the known next symbols that are told."""
    known = following != UNKNOWN
    return float((logits.argmax(-1) == following)[known].float().mean())


@cache
def trained(seed: int = 0, steps: int = 500) -> attlas.Decoder:
    """Heads of one layer read the token before, those of the next what stood behind its like."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config = attlas.DecoderConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=LENGTH, initializer_range=0.1,
    )  # fmt: skip
    model = attlas.Decoder(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        ids, following = strings(64, generator)
        loss = cross_entropy(model(input_ids=ids).logits.mT, following, ignore_index=UNKNOWN)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()
