"""Gradient checkpointing: what is computed again for gradients belongs to the call of the first time.

Transformers hands each checkpointed block to a function that it has set on the block. While a model is
attached that function first notes the call under way, and what it computes again runs under that call:
parts change it as before, and recorders are not shown it a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attlas.errors import UserError
from attlas.hf import interface


def checkpoints(module: nn.Module) -> bool:
    """Whether a call of the module now would be checkpointed."""
    if not (module.training and torch.is_grad_enabled()):
        return False
    return any(getattr(m, "gradient_checkpointing", False) for m in module.modules())


def follow(held: Any) -> None:
    """Have checkpointed blocks of a model note the call under way, until the session ends."""
    for module in held.tower.module.modules():
        function = interface.checkpointing(module)
        if function is not None and not isinstance(function, Noting):
            interface.set_checkpointing(module, Noting(held, function))
            held.undo.append(lambda m=module, f=function: _let_go(m, f))


class Noting:
    """A checkpointing function under which a block is computed again as it was the first time."""

    def __init__(self, held: Any, function: Callable[..., Any]) -> None:
        self.held, self.function = held, function

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the block gives, now and again."""
        held, under = self.held, self.held.under
        noted = None if under is None else under.repeated()

        def run(*given: Any, **more: Any) -> Any:
            if noted is None or held.under is not None:
                return block(*given, **more)
            if not held.undo:
                raise UserError(
                    "gradients of a checkpointed call of an attached model are computed after its "
                    "session was left; call backward() inside the with block"
                )
            held.under = noted.repeated()
            try:
                return block(*given, **more)
            finally:
                held.under = None

        return self.function(run, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self.function,)


def _same(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def _let_go(module: nn.Module, function: Callable[..., Any]) -> None:
    if isinstance(interface.checkpointing(module), Noting):
        interface.set_checkpointing(module, function)
