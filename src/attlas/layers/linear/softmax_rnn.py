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

Cost: Σ_{n≤N} C(d+n−1, n) features, so many × d numbers in a state; `order=None`, and no more than
twice as many tokens without a cache, n² weights.
Reduces to softmax attention with `order=None`, no clamp and the sum.
Source: "On the Expressiveness of Softmax Attention: A Recurrent Neural Network Perspective" and its
authors' program, which clamps scores at 5 before it exponentiates them, wherever nothing divides.
"""

from __future__ import annotations

from dataclasses import replace
from math import comb, factorial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import elu, relu

from attlas import ops
from attlas.attention import Attention
from attlas.bases.recurrent import Gates, RecurrentAttention
from attlas.catalog.registry import Reduction, mechanism
from attlas.errors import UserError
from attlas.inputs import Inputs
from attlas.options import option
from attlas.tracing import kept


@mechanism("softmax-as-rnn", reduces_to=Reduction(
    "softmax", {"order": None}, lambda layer, plain: plain.load_state_dict(layer.state_dict()),
))  # fmt: skip
class SoftmaxAsRNN(RecurrentAttention):
    """Softmax attention up to a power of the scores, or with another kernel or divisor."""

    supports = replace(RecurrentAttention.supports, masks="padding")
    beyond = ("output: the paper's studies gate or normalise the heads in the divisor's place",)

    order: int | None = option(
        "highest power that is kept, None for all; of the kernel 'exp' alone", default=2, at_least=0
    )
    kernel: Literal["exp", "elu", "relu"] = option(
        "weight of a pair before it is divided", default="exp"
    )
    divisor: Literal["sum", "length", "none"] = option("what divides weights", default="sum")
    gated: bool = option("whether outputs are gated", default=False, alias="gate")
    normed: bool = option("whether outputs are normalised", default=False, alias="norm")
    clamp: float | None = option(
        "most that a score may be before it is exponentiated; None for no bound", default=None
    )

    def setup(self) -> None:
        """What stands in the divisor's place.

        Raises:
            ValueError: an odd order, whose sum may be negative; or a clamp where nothing is clamped.
        """
        super().setup()
        if self.kernel == "exp" and self.divisor == "sum" and self.order and self.order % 2:
            raise UserError(f"order must be even for a positive sum, got {self.order}")
        if self.clamp is not None and not self.pairwise:
            raise UserError(f"clamp is for order=None and kernel='exp', got {self.clamp}")
        self.scale = self.head_dim**-0.5 if self.pairwise else 1.0  # powers carry it
        self.normalized = self.divisor == "sum"
        if self.gated:
            self.gate_proj = nn.Linear(self.dim, self.heads)
        if self.normed:
            self.norm = nn.RMSNorm(self.head_dim)

    @property
    def pairwise(self) -> bool:
        """Whether all powers are kept, so that the exponential of every pair is needed."""
        return self.kernel == "exp" and self.order is None

    @property
    def monomials(self) -> int:
        """Features of the powers that are kept."""
        assert self.order is not None
        return comb(self.head_dim + self.order, self.order)

    @property
    def keeps_keys(self) -> bool:
        """A cache keeps keys where all pairs are needed, else a state."""
        return self.pairwise

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Of the kernel, whose product is the weight of a pair; of all powers, its score."""
        if self.kernel == "elu":
            return elu(q) + 1, elu(k) + 1
        if self.kernel == "relu":
            return relu(q), relu(k)
        if self.order is None:
            return q, k
        root = self.head_dim**-0.25
        return powers(q * root, self.order), powers(k * root, self.order)

    def terms(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Gates]:
        """The recurrence's; the number of keys divides queries."""
        q, k, gates = super().terms(q, k, inputs)
        return (q / self.counts(inputs)).to(q.dtype) if self.divisor == "length" else q, k, gates

    def counts(self, inputs: Inputs) -> Float[Tensor, "batch_or_1 1 queries_or_1 1"]:
        """How many valid keys each query sees, at least 1."""
        valid = inputs.valid
        if valid is None:
            valid = torch.ones_like(inputs.key_positions.view(-1, inputs.key_positions.shape[-1]))
        seen = valid.sum(-1, keepdim=True)
        if self.causal:
            seen = valid.cumsum(-1)[:, -inputs.x.shape[1] :]
        return seen.clamp(min=1).to(inputs.x.dtype)[:, None, :, None]

    def score(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """Scores of all pairs, of which none is larger than the clamp."""
        dtype = q.dtype if self.order is None else torch.promote_types(q.dtype, torch.float32)
        scores = ops.grouped_product(q.to(dtype) * self.head_dim**-0.5, k.to(dtype).mT)
        return scores if self.clamp is None else scores.clamp(max=self.clamp)

    def normalize(self, scores: Tensor, inputs: Inputs) -> Tensor:
        """Exponentials, or their first terms, over the divisor."""
        if self.order is None and self.divisor == "sum":
            return ops.softmax(scores)
        weights = scores.exp() if self.order is None else series(scores, self.order)
        if self.divisor == "sum":
            return ops.divided(weights, weights.sum(-1, keepdim=True))
        return weights / self.counts(inputs) if self.divisor == "length" else weights

    def weigh(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """Of `exp`, by the stages; of other kernels the recurrence's map."""
        if self.kernel != "exp":
            return super().weigh(q, k, inputs)
        inputs.refuse_weights(inputs.recall("state") is not None)
        return Attention.weigh(self, q, k, inputs).to(q.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """The recurrences together, or all pairs where these are fewer numbers."""
        if self.pairwise:
            if self.divisor == "sum" and self.clamp is None:
                return self.fused(q, k, v, inputs)
            return self.aggregate(self.weigh(q, k, inputs), v, inputs)
        # Terms of both signs cancel in a row: what is rounded once more leaves noise.
        with torch.autocast(q.device.type, enabled=False):
            if self.kernel == "exp" and inputs.cache is None and k.shape[2] <= 2 * self.monomials:
                return self.aggregate(self.weigh(q, k, inputs), v, inputs)
            return super().attend(q, k, v, inputs)

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Heads normalised and gated, where they are, and projected."""
        if self.normed:
            heads = self.norm(heads)
        if self.gated:
            heads = heads * self.gate_proj(inputs.x).sigmoid().mT[..., None]
        return super().output(heads, inputs)


def series(scores: Float[Tensor, "*pairs"], order: int) -> Float[Tensor, "*pairs"]:
    """Σ_{n ≤ order} sⁿ / n!; 0 where a pair is hidden."""
    hidden = scores == -torch.inf
    scores, total = scores.masked_fill(hidden, 0.0), torch.ones_like(scores)
    for n in range(order, 0, -1):
        total = total * scores / n + 1
    return total.masked_fill(hidden, 0.0)


def powers(x: Float[Tensor, "*rows width"], order: int) -> Float[Tensor, "*rows features"]:
    """Features whose product is Σ_{n ≤ order} (x·y)ⁿ / n!, every monomial once."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    found = [torch.ones_like(wide[..., :1])]
    for n in range(1, order + 1):
        channels, share = _monomials(x.shape[-1], n, x.device)
        term = share.to(wide.dtype)
        for factor in channels.unbind(-1):
            term = term * wide.index_select(-1, factor)
        found.append(term)
    return torch.cat(found, dim=-1)


@kept(32)
def _monomials(width: int, order: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(channels [monomials, order], 1/√Π m!) of all monomials with multiplicities m."""
    each: list[tuple[int, ...]] = [()]
    for _ in range(order):
        each = [(*one, n) for one in each for n in range(one[-1] if one else 0, width)]
    orders = [1] * len(each)
    for at, one in enumerate(each):
        for channel in set(one):
            orders[at] *= factorial(one.count(channel))
    shares = [order**-0.5 for order in orders]
    return torch.tensor(each, device=device), torch.tensor(
        shares, dtype=torch.float64, device=device
    )
