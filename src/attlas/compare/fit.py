"""What can be told before anything is run: does this model take these methods at these lengths?"""

from __future__ import annotations

from typing import Any

import torch

from attlas.attach import attach
from attlas.cache.policy import CachePolicy
from attlas.compare.grid import Grid
from attlas.compare.methods import Method
from attlas.compare.shared import attached
from attlas.errors import UserError
from attlas.hf.sources import cached_channels, kv_heads
from attlas.storage.layer import INDEX_BYTES


def check_fit(grid: Grid, model: Any, tokenizer: Any) -> None:
    """Refuse what would fail in the middle of the run.

    Raises:
        UserError: a model that cannot be intercepted, a method that cannot work on it, a budget
            that does not fit a length, or a length too short for a task's texts.
    """
    with attach(model):  # refuses a model whose attention cannot be intercepted
        pass
    for method in grid.methods:
        parts = method.parts()
        try:
            with attached(model, parts):
                pass
        except (TypeError, ValueError) as error:
            raise UserError(f"method {method.label} on model {grid.model!r}: {error}") from error
        for part in parts:
            for length in grid.lengths if isinstance(part, CachePolicy) else ():
                check_budget(method, part, model, length)
    refused: dict[str, UserError] = {}
    for unit in grid.units():
        if unit.length == grid.lengths[0]:
            try:
                unit.context.text(tokenizer, grid.preset, unit.length, unit.depth, str(grid.seed))
            except UserError as error:
                refused[str(error)] = error
    if refused:
        raise UserError("; ".join(refused)) from next(iter(refused.values()))


def check_budget(method: Method, part: CachePolicy, model: Any, length: int) -> None:
    """Refuse a budget larger than a context or smaller than what the method must hold.

    Raises:
        UserError: naming the method, its budget and the length.
    """
    layers = part.states(part.fresh_layers(model), model)
    heads = kv_heads(model.config.get_text_config(decoder=True), min(layers))
    channels = cached_channels(model)
    budget = part.budget
    whole = sum(channels) * length * model.dtype.itemsize
    slot = whole // (length * len(layers))
    if (budget.tokens or 0) > length or (budget.bytes or 0) > whole:
        raise UserError(
            f"method {method.label}: the budget {budget} is larger than a context of {length} "
            f"tokens ({whole} bytes); give a smaller budget or ask for longer lengths"
        )
    try:
        slots = budget.slots(
            torch.tensor([length]),
            slot_bytes=slot,
            index_bytes=heads * INDEX_BYTES,
            layers=len(layers),
            whole=len(part.skipped),
            windows=0,
        )
    except ValueError as error:
        raise UserError(f"method {method.label} at length {length}: {error}") from error
    name, least = part.floor
    if least > int(slots) < length:
        raise UserError(
            f"method {method.label}: at length {length} its budget keeps {int(slots)} tokens, fewer "
            f"than {name}={least}; give a larger budget, a smaller {name}, or ask for longer lengths"
        )
