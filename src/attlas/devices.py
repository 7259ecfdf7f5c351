"""The device that a command is told to run on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attlas.errors import UserError

if TYPE_CHECKING:
    import torch


def device_here(name: str, *, auto: bool = True) -> torch.device:
    """cpu, cuda, cuda:N or, unless `auto` is off, auto: a GPU where there is one.

    Raises:
        UserError: it is not here, or no such word.
    """
    import torch

    count = torch.cuda.device_count()
    if auto and name == "auto":
        return torch.device("cuda" if count else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        words = "cpu, cuda, cuda:N or auto" if auto else "cpu, cuda or cuda:N"
        raise UserError(f"device takes {words}, got {name!r}")
    if kind == "cuda" and int(index or 0) >= count:
        seen = f"{count} GPUs" if count else "no GPU"
        raise UserError(f"device {name!r} is not here: PyTorch sees {seen}; use cpu")
    return torch.device(name)
