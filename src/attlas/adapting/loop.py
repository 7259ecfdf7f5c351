"""Training what an adapter trains: a plain loop that can be interrupted and resumed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attlas.adapting.texts import Texts
from attlas.errors import UserError
from attlas.kinds.adapter import Adapter
from attlas.train import checkpoint
from attlas.train.data import seed_of

#: Steps between checkpoints, and the share of all steps over which the rate rises to its full size.
SAVE = 20
WARM_UP = 0.1
CLIP = 1.0

#: Told of the steps done, and of the loss of the last one.
Tick = Callable[[int, float], None]


@dataclass(frozen=True, slots=True)
class Job:
    """How to train.

    Attributes:
        steps: of the optimiser, AdamW without decay.
        batch: pieces of text of a step.
        rate: the learning rate after warming up.
        seed: decides which pieces are read.
    """

    steps: int
    batch: int
    rate: float
    seed: int


def train(
    adapter: Adapter, model: Any, texts: Texts, job: Job, folder: Path, tick: Tick
) -> list[float]:
    """Train from the newest checkpoint in `folder`, or from the beginning; the losses of all steps.

    Interrupted, it writes a checkpoint after the last whole step and lets the interruption pass.

    Raises:
        ValueError: a loss that is no finite number; what was done before it is kept.
    """
    trained = nn.ParameterList(adapter.trainable().values())
    adam = torch.optim.AdamW(trained.parameters(), lr=job.rate, weight_decay=0.0)
    state: dict[str, Any] = checkpoint.load(folder, trained, adam) or {"step": 0, "losses": []}
    whole = True  # whether parameters and state are those of the same step
    model.train()
    try:
        for step in range(state["step"], job.steps):
            ids = texts.batch(job.batch, job.seed, step).to(model.device)
            torch.manual_seed(seed_of("noise", job.seed, step))
            loss = adapter.loss(model, ids, step / job.steps)
            if not math.isfinite(loss.item()):
                raise UserError(
                    f"the loss is no finite number at step {step + 1}; take another folder with --out "
                    f"and a smaller --rate than {job.rate}"
                )
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained.parameters(), CLIP)
            warm = max(1, round(WARM_UP * job.steps))
            for group in adam.param_groups:
                group["lr"] = job.rate * min(1.0, (step + 1) / warm)
            whole = False
            adam.step()
            state["step"] = step + 1
            state["losses"].append(loss.item())
            whole = True
            tick(step + 1, loss.item())
            if (step + 1) % SAVE == 0 or step + 1 == job.steps:
                checkpoint.save(folder, trained, adam, state)
    except KeyboardInterrupt:
        if whole and state["step"]:
            checkpoint.save(folder, trained, adam, state)
        raise
    finally:
        model.eval()
    losses: list[float] = state["losses"]
    return losses
