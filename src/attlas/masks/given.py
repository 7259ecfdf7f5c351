"""Masks as users hold them, made the one thing that layers read: True where a token or a pair is seen.

    booleans, integers      true where not 0: what tokenizers give
    floats                  added to scores, as in PyTorch and Transformers: 0 seen, −∞ (or so little that
                            no score outweighs it) hidden; [batch, keys] of ones and zeros: 1 is a token
"""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor

from attlas.errors import UserError
from attlas.tracing import traced

#: Added to a score, it leaves no weight: e^−9000 = 0 in every precision. −10000 (in bfloat16 −9984), −1e9
#: and the least number of a precision all hide.
HIDDEN = -9e3


def seen(mask: Tensor, name: str = "mask") -> Bool[Tensor, ...]:
    """The mask as booleans, True where a token or a pair is seen.

    Args:
        mask: [batch, keys] or [batch, heads, queries, keys].
        name: what the caller calls it.

    Raises:
        UserError: floats that are neither 0 nor hide, and are not all ones and zeros: a bias on scores.
    """
    if mask.dtype == torch.bool:
        return mask
    if not (mask.is_floating_point() or mask.is_complex()):
        return mask != 0
    if mask.is_complex():
        raise UserError(f"{name} takes booleans, True where a token or pair is seen; got {mask.dtype}")
    hidden, nothing = mask <= HIDDEN, mask == 0
    shown, right = ~hidden, hidden | nothing
    if mask.ndim == 2:
        ones = mask == 1
        told = ones.any()  # one 1, and 1 is a token
        shown, right = torch.where(told, ones, shown), torch.where(told, ones | nothing, right)
    message = (
        f"{name} of floats takes 0 where a pair is seen and -inf where it is hidden, or at tokens "
        f"[batch, keys] 1 and 0; got other numbers in {list(mask.shape)}: a bias on scores is a position "
        "encoding's or a score_mod's; what is seen is told by a bool mask, True where it is"
    )
    if traced():
        torch._assert_async(right.all(), message)
    elif not right.all():
        raise UserError(message)
    return shown
