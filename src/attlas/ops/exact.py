"""Sums that must not be rounded on the way: autocast ends where they begin.

Under autocast a product of matrices is made in half precision whatever its factors are. Of a projection
that is a rounding of one step; of a state that is carried from token to token, of a system of equations
or of sums that overflow float16 it is another answer. What is `exact` computes in the types that it is
given, as it does without autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

P = ParamSpec("P")
R = TypeVar("R")


def exact(function: Callable[P, R]) -> Callable[P, R]:
    """A function of tensors that autocast does not reach."""

    @wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> R:
        given = (x for x in (*args, *options.values()) if isinstance(x, Tensor))
        device = next(given).device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return function(*args, **options)
        with torch.autocast(device, enabled=False):
            return function(*args, **options)

    return run


def wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@exact
def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, of sums that are carried on."""
    return a @ b


def unit(x: Tensor, eps: float = 1e-12) -> Tensor:
    """x / |x|, of which 0 stays 0 in half precision too, where an ε of 1e-12 is none."""
    return normalize(x, dim=-1, eps=max(eps, torch.finfo(x.dtype).tiny))


def recomputed(function: Callable[..., R], *args: object, when: bool = True) -> R:
    """function(*args), of which a backward pass finds what it needs by computing it again, `when` so.

    `torch.func` knows no such hooks; its transforms keep everything.
    """
    if not when or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return function(*args)
    found: R = checkpoint(function, *args, use_reentrant=False)
    return found
