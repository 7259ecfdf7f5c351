"""Where tokens stand: by their order, padding left out, and whether two tellings of it agree."""

from __future__ import annotations

import torch
from torch import Tensor

from attlas.tracing import kept, traced


def in_order(seen: int, tokens: Tensor, valid: Tensor | None) -> Tensor:
    """Positions of the cached and the new tokens; padding does not count."""
    if valid is not None:
        return (valid.long().cumsum(-1) - 1).clamp(min=0)
    count = seen + tokens.shape[1]
    if seen == 0 or traced():
        return counted(count, tokens.device)
    # Each step of decoding asks for one more, of a row that is kept.
    return counted(1 << count.bit_length(), tokens.device)[:count]


@kept(8)
def counted(tokens: int, device: torch.device) -> Tensor:
    """Positions of so many tokens one behind the other."""
    return torch.arange(tokens, device=device)


def one_number(x: Tensor, shown: Tensor | None) -> bool:
    """Whether what is shown of each row, all unless told, is one number."""
    most = torch.iinfo(x.dtype).max
    low, high = (x if shown is None else x.where(shown, most * sign) for sign in (1, -1))
    return bool((low.amin(-1) >= high.amax(-1)).all())


def agree(some: Tensor, others: Tensor) -> bool:
    """Whether positions are the same in every row."""
    return bool((some == others).all())
