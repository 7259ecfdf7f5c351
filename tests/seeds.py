"""Scores of trained models, which one processor's rounding can turn: means over seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from attlas.contract.unchecked import unchecked


def mean_over_seeds(trained: Callable[[], float | Sequence[float]], count: int = 2) -> Any:
    """The mean of what `trained` returns, a number or several, over so many seeds.

    Whatever it draws, it draws from the seed that is set for it, or from `generator()`. Margins were
    measured with one thread and two, in float32 and in float64, and stand beside the assertions.
    Shapes are not checked meanwhile: the contract does that, and small models train twice as fast.
    """
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        with unchecked():
            found.append(trained())
    return torch.tensor(found, dtype=torch.float64).mean(0).tolist()


def generator(apart: int = 0) -> torch.Generator:
    """Of data, of its own for each seed; `apart` tells training from what is held out."""
    return torch.Generator().manual_seed(1000 * apart + torch.initial_seed())
