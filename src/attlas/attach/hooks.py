"""Hooks on a model's modules that a copy of the model does not take along and no compiler traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

#: What `torch.compile(fullgraph=True)` tells of a graph that breaks at an attached model.
REASON = "an attached model runs uncompiled; compile it without fullgraph=True while it is attached"


class Hook:
    """A function that is called before or after a module.

    A deep copy of the module, or one that was saved with it, does nothing: a copy that is made while a
    model is attached (an average of weights, a reference model) is a plain model.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = torch.compiler.disable(function, reason=REASON)

    def __call__(self, *given: Any) -> Any:
        """What the function gives."""
        return self.function(*given)

    def __reduce__(self) -> tuple[Any, ...]:
        return _copied, ()


def before(module: nn.Module, function: Callable[..., Any]) -> Callable[[], Any]:
    """Call function(module, args, kwargs) before each call of a module; gives what takes it back."""
    return module.register_forward_pre_hook(Hook(function), with_kwargs=True).remove


def after(module: nn.Module, function: Callable[..., Any], always: bool = False) -> Callable[[], Any]:
    """Call function(module, args, output) after each call of a module.

    Args:
        module: whose calls are meant.
        function: may give another output.
        always: after calls that failed too.
    """
    return module.register_forward_hook(Hook(function), always_call=always).remove


def nothing(*_: Any) -> None:
    """What a hook is on a copy."""


def _copied() -> Callable[..., None]:
    return nothing
