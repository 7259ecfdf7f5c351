"""When tensors stand for others, so that nothing may be asked of them or kept; and what else is kept."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import lru_cache, update_wrapper
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def traced() -> bool:
    """Whether tensors stand for others now: in torch.compile, torch.export, torch.func, or as fake ones.

    No truth may be asked of such a tensor in Python, and nothing made of it may be kept for later calls.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
    )


def any_length(tokens: int) -> bool:
    """Whether a program is made for every number of tokens (torch.export with a dynamic length), so that
    no number may decide how often a loop runs."""
    strict = torch.compiler.is_dynamo_compiling()  # in which it looks like a number
    # `is_exporting()` itself is True in all that PyTorch 2.11 compiles.
    return torch.compiler._is_exporting_flag and (strict or not isinstance(tokens, int))


def stretches(tokens: int, size: int) -> list[slice]:
    """`tokens` in stretches of `size`; in one where a program is made for any length."""
    if any_length(tokens):
        return [slice(0, tokens)]
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def once(function: Callable[P, R]) -> Callable[P, R]:
    """The function with its tensors fit for training, whoever asks for them: a tensor made in inference
    mode could never be part of a graph."""

    def made(*args: P.args, **options: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **options)

    return made


#: Where a recorded step (`attlas.attach.captured`) keeps what it was given of answers that are kept here:
#: it reads their memory as long as it lives, and they may be let go for others.
HOLDING: ContextVar[list[Any] | None] = ContextVar("HOLDING", default=None)


def held(answer: R) -> R:
    """The answer, which a step that is recorded now holds too."""
    if (holding := HOLDING.get()) is not None:
        holding.append(answer)
    return answer


def kept(maxsize: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Keep the tensors that a function makes of plain arguments, `maxsize` answers at most."""

    def keep(function: Callable[P, R]) -> Callable[P, R]:
        remembered = lru_cache(maxsize)(once(function))

        def call(*args: P.args, **options: P.kwargs) -> R:
            if traced():
                return function(*args, **options)
            return held(remembered(*args, **options))  # type: ignore[arg-type]

        return update_wrapper(call, function)

    return keep
