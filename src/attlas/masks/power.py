"""Powers: a local window, the first tokens, and what stands a power of two away, in blocks.

    visible(q, k) = k ≤ q  and  ( i − j < w  or  j < s  or  i − j a power of two ),   i = q//b, j = k//b

Stacked d times, every distance below 2^d blocks can be crossed, without gaps: written in binary it has
at most d ones, each of them a hop. A window of w blocks a layer reaches d·(w − 1).

Cost: (w + s + log₂(n/b)) blocks of keys for each query. Reduces to causal attention where the window
covers the text.
Source: "PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attlas.catalog.kinds import MASK
from attlas.catalog.registry import mechanism
from attlas.errors import at_least_one
from attlas.masks.algebra import Mask, Reach
from attlas.masks.patterns import blocks, causal, sinks, window

#: Powers that are told apart: distances up to 2^62.
POWERS = 63


@dataclass(frozen=True, repr=False)
class _Powers(Mask):
    tensors = ()  # said outright, as compilers do not look through a frozen dataclass
    leaves = ()
    relative = True

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        away = q - k
        return (away > 0) & ((away & (away - 1)) == 0)

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        low, high = (q_lo - k_hi).clamp(min=1), q_hi - k_lo
        powers = 2 ** torch.arange(POWERS, device=low.device)
        # The largest power up to the far end stands in the interval, or none does.
        at = torch.searchsorted(powers, high.clamp(min=1).contiguous(), right=True) - 1
        some = (powers[at] >= low) & (high >= 1)
        alone = (q_hi - k_lo == q_lo - k_hi) | ((q_lo - k_hi == 1) & (high == 2))
        return some, some & alone

    def __repr__(self) -> str:
        return "powers"


#: Keys that stand 1, 2, 4, 8, … before the query.
powers: Mask = _Powers()


@mechanism(
    "power-mask", paper="power-attention", kind=MASK,
    example={"size": 2, "window_blocks": 2, "sink_blocks": 1},
)  # fmt: skip
def power(size: int = 64, *, window_blocks: int = 4, sink_blocks: int = 1) -> Mask:
    """PowerAttention's causal pattern.

    Args:
        size: tokens of a block; at 1 single tokens.
        window_blocks: newest blocks, the query's own included.
        sink_blocks: first blocks, which all see.

    Raises:
        ValueError: a size or window below 1, fewer sinks than none.
    """
    near = window(at_least_one("window_blocks", window_blocks)) | powers
    if sink_blocks < 0:
        raise ValueError(f"sink_blocks must be at least 0, got {sink_blocks}")
    return causal & blocks(near | sinks(sink_blocks) if sink_blocks else near, at_least_one("size", size))
