"""HeadMask: in training, a few heads are switched off for each batch, so that none becomes indispensable.

    head_h ← ξ_h · head_h,   ξ_h = 0 for N heads and 1 for the others;   in evaluation 1 for all
    random       the N heads are drawn anew for each forward pass
    importance   those with the largest I_h = E_x |∂ loss / ∂ ξ_h|

I_h comes from the backward pass before, in which a head that is off has its gradient too. The paper
spends an extra pass over the same batch with all heads on, which `measuring` does:

    with measuring(model):
        loss_of(model, batch).backward()
    optimizer.zero_grad()
    loss_of(model, batch).backward()

Cost: plain attention; heads that are off are computed all the same.
Reduces to multi-head attention in evaluation. What is left is not rescaled.
Source: "Alleviating the Inequality of Attention Heads for Neural Machine Translation". It counts N over
a model, 18 of 144 heads; here it is a layer's. No code is published; not established is whether the paper
rescales what is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.options import option


@mechanism("headmask", reduces_to=Reduction(
    "softmax", {}, lambda layer, plain: plain.load_state_dict(layer.state_dict())
))  # fmt: skip
class HeadMask(Attention):
    """Attention that trains with some heads switched off."""

    masked: int = option("N, heads switched off in training", default=1, at_least=0)
    choice: Literal["random", "importance"] = option("which ones", default="random")

    def setup(self) -> None:
        """The heads' importance, by chance until a first backward pass has told."""
        super().setup()
        if self.masked >= self.heads:
            raise ValueError(f"masked must be below heads={self.heads}, got {self.masked}")
        self.measuring = False
        self.importance: Tensor
        self.hold("importance", lambda: torch.rand(self.heads))

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Heads times their gates in training, joined and projected."""
        return super().output(heads * self.head_gates(heads) if self.training else heads, inputs)

    def head_gates(self, heads: Tensor) -> Tensor:
        """ξ for [batch, heads, queries, width]: 0 for N heads, the same for the whole batch."""
        importance = self.importance.to(heads.device)
        rank = torch.rand_like(importance) if self.choice == "random" else importance
        off = 0 if self.measuring else self.masked
        shown = torch.ones_like(rank).scatter(0, rank.topk(off).indices, 0.0)
        gates = shown.to(heads.dtype).expand(len(heads), -1)[..., None, None]
        if self.choice == "importance" and torch.is_grad_enabled():
            gates = gates.clone().requires_grad_()
            gates.register_hook(self._measure)
        return gates

    def _measure(self, gradient: Tensor) -> None:
        self.importance.copy_(gradient.abs().sum((0, 2, 3)))


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """All heads are on while this lasts, so that a backward pass tells their importance."""
    layers = [layer for layer in model.modules() if isinstance(layer, HeadMask)]
    for layer in layers:
        layer.measuring = True
    try:
        yield
    finally:
        for layer in layers:
            layer.measuring = False
