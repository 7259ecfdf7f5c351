"""Elementwise functions as one kernel on a GPU: compiled once for any length, plain elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


class Programs:
    """`with Programs(64):` a function may be compiled so often in here; Dynamo runs the ninth unfused.

    It is `torch._dynamo.config.patch(recompile_limit=64)`, which makes a class whenever it is called:
    25 microseconds, as long as the call that they are for.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def __enter__(self) -> None:
        config = torch._dynamo.config
        self.before, config.recompile_limit = config.recompile_limit, self.limit

    def __exit__(self, *error: object) -> None:
        torch._dynamo.config.recompile_limit = self.before


#: Ranks, precisions and strides that one process may compile a function for.
PROGRAMS = 64


def fused(function: F) -> F:
    """A function of tensors that a GPU runs as one kernel; in eager PyTorch each step is a pass over
    memory, and a rotation has seven.
    """

    @wraps(function)
    def run(*args: Any) -> Any:
        on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in args)
        if not on_gpu or torch.compiler.is_compiling():
            return function(*args)
        with Programs(PROGRAMS):
            return _compiled(function)(*args)

    return run  # type: ignore[return-value]


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)
