"""A plain training loop for the small models of studies, which look at them while they learn."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

#: Share of the steps in which the learning rate rises.
WARM = 0.05


def fit(
    model: nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    rate: float,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW with a cosine schedule and gradients clipped at 1.

    Args:
        model: in training mode meanwhile, in evaluation mode behind.
        loss: of a fresh batch.
        steps: of the optimiser.
        rate: highest learning rate.
        after: called with the number of steps done, 0 before the first.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    warm = max(1, int(WARM * steps))

    def share(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    after(0)
    for step in range(steps):
        model.train()
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.eval()
        after(step + 1)
    model.eval()
