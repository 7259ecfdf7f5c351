"""Softmax attention as a sum of recurrences, one for each power of a score; a study of its parts.

    e^{q·k} = Σ_n (q·k)ⁿ / n!,    (q·k)ⁿ = ⟨q^{⊗n}, k^{⊗n}⟩          H_n,t = Σ_{s≤t} k_s^{⊗n} v_sᵀ / n!
    y_t = Σ_{n≤N} ⟨q_t^{⊗n}, H_n,t⟩ / G_t

Linear attention is one such term; softmax has them all, with ever larger states. `order` keeps those up
to N, `order=None` all of them, as e^{q·k} of all pairs. G is what the paper varies besides:

| divisor  | G_t                                 |   | kernel      | weight of a pair before G          |
|----------|-------------------------------------|---|-------------|------------------------------------|
| "sum"    | the sum of the weights (softmax)    |   | "exp"       | e^{q·k/√d}, or its first terms     |
| "length" | the number of keys seen             |   | "elu"       | (elu(q) + 1)·(elu(k) + 1)          |
| "none"   | 1                                   |   | "relu"      | relu(q)·relu(k)                    |

with `gate`, y_t times σ(w·x_t + b), one number a head, and with `norm` an RMSNorm of each head.

Cost: Σ_{n≤N} C(d+n−1, n) features, so many × d numbers in a state; `order=None` n² weights.
Reduces to softmax attention with `order=None`, no clamp and the sum.
Source: "On the Expressiveness of Softmax Attention: A Recurrent Neural Network Perspective" and its
authors' program, which clamps scores at 5 before it exponentiates them, wherever nothing divides.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations_with_replacement
from math import factorial, prod
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import elu, relu

from attlas import ops
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.bases.recurrent import Gates, RecurrentAttention
from attlas.masks import Mask

Kernel = Literal["exp", "elu", "relu"]
Divisor = Literal["sum", "length", "none"]


@mechanism("softmax-as-rnn", reduces_to=Reduction(
    "softmax", {"order": None}, lambda layer, plain: plain.load_state_dict(layer.state_dict()),
))  # fmt: skip
class SoftmaxAsRNN(RecurrentAttention):
    """Softmax attention up to a power of the scores, or with another kernel or divisor.

    Args:
        order: highest power that is kept, None for all; of the kernel "exp" alone.
        kernel: weight of a pair before it is divided.
        divisor: what weights are divided by.
        gate: whether outputs are gated.
        norm: whether outputs are normalised.
        clamp: most that a score may be before it is exponentiated; None for no bound.

    Raises:
        ValueError: an unknown kernel or divisor, a negative order, an odd one whose sum may be
            negative, a clamp of a series, or a position encoding that adds to scores.
    """

    takes_masks = "padding"

    def __init__(
        self, dim: int, heads: int = 8, *args: Any, order: int | None = 2, kernel: Kernel = "exp",
        divisor: Divisor = "sum", gate: bool = False, norm: bool = False, clamp: float | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        for name, got, takes in (("kernel", kernel, Kernel), ("divisor", divisor, Divisor)):
            if got not in get_args(takes):
                raise ValueError(f"{name} must be one of {list(get_args(takes))}, got {got!r}")
        if order is not None and (
            order < 0 or (order % 2 and divisor == "sum" and kernel == "exp")
        ):
            raise ValueError(f"order must be even and at least 0 for a positive sum, got {order}")
        if clamp is not None and (order is not None or kernel != "exp"):
            raise ValueError(f"clamp is for order=None and kernel='exp', got {clamp}")
        self.order, self.kernel, self.divisor, self.clamp = order, kernel, divisor, clamp
        self.gated, self.normed = gate, norm
        self.pairwise = kernel == "exp" and order is None
        super().__init__(dim, heads, *args, **options)
        self.scale = self.head_dim**-0.5 if self.pairwise else 1.0
        self.normalized, self.keeps_keys = divisor == "sum", self.pairwise

    def make_projections(self) -> None:
        """Projections, and what stands in the divisor's place."""
        super().make_projections()
        if self.gated:
            self.gate_proj = nn.Linear(self.dim, self.heads)
        if self.normed:
            self.norm = nn.RMSNorm(self.head_dim)

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Of the kernel, whose product is the weight of a pair."""
        if self.kernel == "exp":
            assert self.order is not None
            root = self.head_dim**-0.25
            return powers(q * root, self.order), powers(k * root, self.order)
        return (elu(q) + 1, elu(k) + 1) if self.kernel == "elu" else (relu(q), relu(k))

    def terms(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Gates]:
        """The recurrence's; the number of keys divides queries."""
        q, k, gates = super().terms(q, k, inputs)
        return (q / self.counts(inputs)).to(q.dtype) if self.divisor == "length" else q, k, gates

    def counts(self, inputs: Inputs) -> Float[Tensor, "batch_or_1 1 queries_or_1 1"]:
        """How many valid keys each query sees, at least 1."""
        keys = inputs.key_positions.shape[-1]
        valid = inputs.valid
        valid = (
            torch.ones(1, keys, dtype=torch.bool, device=inputs.x.device)
            if valid is None
            else valid
        )
        seen = (
            valid.cumsum(-1)[:, -inputs.x.shape[1] :]
            if self.causal
            else valid.sum(-1, keepdim=True)
        )
        return seen.clamp(min=1).to(inputs.x.dtype)[:, None, :, None]

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs
    ) -> Tensor:
        """The recurrences together; of all powers, softmax attention or all pairs."""
        if not self.pairwise:
            return super().attend(q, k, v, inputs)
        if self.divisor == "sum" and self.clamp is None:
            return self.fused(q, k, v, inputs.pairs)
        return self.aggregate(self.weigh(q, k, inputs), v, inputs)

    def weigh(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries keys"]:
        """Weights of all pairs."""
        if not self.pairwise:
            return super().weigh(q, k, inputs)
        scores = ops.grouped_product(q * self.scale, k.mT)
        if self.clamp is not None:
            scores = scores.clamp(max=self.clamp)
        visible = inputs.visible(q, k)
        if visible is not None:
            scores = scores.masked_fill(~visible, -torch.inf)
        if self.divisor == "sum":
            return ops.softmax(scores)
        weights = scores.exp()
        return weights / self.counts(inputs) if self.divisor == "length" else weights

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Heads normalised and gated, where they are, and projected."""
        if self.normed:
            heads = self.norm(heads)
        if self.gated:
            heads = heads * self.gate_proj(inputs.x).sigmoid().mT[..., None]
        return super().output(heads, inputs)


def powers(x: Float[Tensor, "*rows width"], order: int) -> Float[Tensor, "*rows features"]:
    """Features whose product is Σ_{n ≤ order} (x·y)ⁿ / n!, every monomial once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    found = [torch.ones_like(wide[..., :1])]
    for n in range(1, order + 1):
        channels, share = _monomials(x.shape[-1], n, x.device)
        found.append(wide[..., channels].prod(-1) * share.to(wide.dtype))
    return torch.cat(found, dim=-1)


@lru_cache(maxsize=32)
def _monomials(width: int, order: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(channels [monomials, order], 1/√Π m!) of all monomials with multiplicities m."""
    each = list(combinations_with_replacement(range(width), order))
    shares = [
        prod(factorial(one.count(channel)) for channel in set(one)) ** -0.5 for one in each
    ]  # fmt: skip
    return torch.tensor(each, device=device), torch.tensor(
        shares, dtype=torch.float64, device=device
    )
