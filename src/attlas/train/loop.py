"""One run: a model trained from the beginning, or from its newest checkpoint, to the end.

The batch of a step is drawn whole from the seed and the step's number; processes and accumulated
parts each take their rows of it and divide by the count of all, so that losses do not depend on how
many they are. Layers that draw random numbers find them seeded by the step, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from attlas.tasks.roof import clock
from attlas.tasks.train import Task
from attlas.train import checkpoint
from attlas.train.build import Net, build
from attlas.train.data import drawn, seed_of
from attlas.train.measure import score
from attlas.train.plan import Plan, Run

#: Steps between two looks at the losses: reading them makes a GPU wait.
LOG_EVERY = 10
#: Scores on the first split while training, besides the one at the end.
EVALUATIONS = 10
WARM_UP = 0.1
CLIP = 1.0


class Diverged(Exception):
    """The loss of a step is no number."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the loss was no finite number at step {step}")
        self.step = step


@dataclass(frozen=True, slots=True)
class TrainingBench:
    """What all runs share; `tick` is told (steps done now, loss)."""

    plan: Plan
    task: Task
    accelerator: Accelerator
    out: Path
    tick: Callable[[int, float], None]


class Trainer:
    """A run's model, optimiser and state.

    Attributes:
        state: step, losses of all steps, seconds in steps, seconds a step between two looks, and
            scores on the way.
    """

    def __init__(self, bench: TrainingBench, run: Run) -> None:
        self.bench, self.run = bench, run
        self.folder = checkpoint.folder_of(bench.out, run)
        net = build(bench.task, bench.plan.mechanism(run.mechanism), bench.plan, run.seed)
        self.net: Net = net.to(bench.accelerator.device)
        adam = torch.optim.AdamW(self.net.parameters(), lr=0.0, betas=(0.9, 0.98))
        self.state = fresh_state()
        saved = checkpoint.load(self.folder, self.net, adam)
        if saved is not None:
            self.state = saved
        self.model, self.optimizer = bench.accelerator.prepare(self.net, adam)
        self.adam = adam

    def train(self) -> None:
        """Go on to the last step.

        Raises:
            Diverged: at the first step whose loss is no finite number.
        """
        plan, state = self.bench.plan, self.state
        self.bench.tick(state["step"], state["losses"][-1] if state["losses"] else math.nan)
        self.model.train()
        stops = {round(plan.steps * k / EVALUATIONS) for k in range(1, EVALUATIONS)}
        pending: list[Tensor] = []
        start = clock(self.bench.accelerator.device)
        for step in range(state["step"], plan.steps):
            pending.append(self._step(step))
            done = step + 1
            saves = done % plan.save == 0 and done < plan.steps
            if not (saves or done in stops or len(pending) == LOG_EVERY or done == plan.steps):
                continue
            self._look(pending, step + 1 - len(pending))
            spent = clock(self.bench.accelerator.device) - start
            state["seconds"] += spent
            state["paces"].append(spent / len(pending))
            self.bench.tick(len(pending), state["losses"][-1])
            pending = []
            if done in stops:
                state["scores"].append([done, self.score(self.bench.task.splits[0])])
                self.model.train()
            if saves:
                self.save()
            start = clock(self.bench.accelerator.device)

    def score(self, split: str) -> float:
        """The score on a split."""
        return score(self.net, self.bench.task, split, self.bench.plan, self.bench.accelerator)

    def save(self) -> None:
        """Write a checkpoint; one process does."""
        if self.bench.accelerator.is_main_process:
            checkpoint.save(self.folder, self.net, self.adam, self.state)
        self.bench.accelerator.wait_for_everyone()

    def _look(self, pending: list[Tensor], first: int) -> None:
        losses = self.bench.accelerator.reduce(torch.stack(pending), reduction="sum").tolist()
        for step, loss in enumerate(losses, start=first + 1):
            if not math.isfinite(loss):
                raise Diverged(step)
            self.state["losses"].append(loss)
            self.state["step"] = step

    def _step(self, step: int) -> Tensor:
        """One step of the optimiser; this process's share of the loss."""
        plan, task, accelerator = self.bench.plan, self.bench.task, self.bench.accelerator
        processes, own = accelerator.num_processes, accelerator.process_index
        batch = drawn(task, plan.batch, "train", self.run.seed, step)
        count = task.terms(batch)
        torch.manual_seed(seed_of("noise", self.run.seed, step, own))
        total = torch.zeros((), dtype=torch.float64, device=accelerator.device)
        for part in range(plan.accumulate):
            rows = slice(own * plan.accumulate + part, None, processes * plan.accumulate)
            shown = {name: tensor[rows].to(accelerator.device) for name, tensor in batch.items()}
            last = part == plan.accumulate - 1
            with nullcontext() if last else accelerator.no_sync(self.model):
                output, extra = self.model(shown)
                loss = task.loss(output, shown) / count
                # Gradients are averaged over the processes, of which each has a part of the sum.
                accelerator.backward(loss * processes + extra / plan.accumulate)
            total += loss.detach()
        for group in self.optimizer.param_groups:
            group["lr"] = rate(step, plan)
        accelerator.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def fresh_state() -> dict[str, Any]:
    """The state of a run that has not begun."""
    return {"step": 0, "losses": [], "seconds": 0.0, "paces": [], "scores": []}


def rate(step: int, plan: Plan) -> float:
    """The learning rate of a step: up in a line over the first tenth, then a cosine down to 0."""
    warm = max(1, round(WARM_UP * plan.steps))
    if step < warm:
        return plan.rate * (step + 1) / warm
    return plan.rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, plan.steps - warm)))
