"""Contextual position encoding (CoPE): positions are counted by gates that read the text.

    g_ij = σ(q_i·k_j / √d)                      which keys count
    p_ij = Σ_{l=j..i} g_il, at most npos − 1    how many since key j
    z_i[n] = q_i·e[n],  z_i(p) linear between ⌊p⌋ and ⌈p⌉
    weights = softmax((q_i·k_j + z_i(p_ij)) / √d)

Cost: the scores twice more, and some dozen operations on each. The gates' sums need whole rows.
Reduces to learned relative positions when every gate is 1, to none when e is 0, as it starts.
Source: "Contextual Position Encoding: Learning to Count What's Important". The paper writes the
scores and gates without the 1/√d, which the authors' code puts on both, as here.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.options import option
from attlas.supports import Supports


@mechanism("contextual-position-encoding", aliases=("cope",), reduces_to=Reduction(
    "softmax", {}, lambda cope, plain: plain.load_state_dict(cope.state_dict(), strict=False)
))  # fmt: skip
class ContextualPosition(Attention):
    """Attention with contextual positions; rotary ones, if asked for, come on top."""

    claims = (
        Claim(
            "counts what matters, also at distances that training did not show",
            ours="contextual-position-encoding(position='none')",
            against=("softmax", "softmax(position='none')"), task="counting", split="more passes",
        ),
    )  # fmt: skip

    supports = Supports()
    changes = ("position",)  # counted by the score
    expected_failures: ClassVar[dict[str, str]] = {
        "told-positions": "positions are sums of gates over the tokens between, in their order"
    }
    beyond = ("project: two published variants give the gates keys of their own, or the values",)

    npos: int = option(
        "positions that can be told apart; all beyond share the last", default=64, at_least=1
    )
    gate_keys: bool = option("a key projection of the gates' own (sep-keys)", default=False)
    value_gates: bool = option("gates from q·v instead of q·k (val-gates)", default=False)
    undivided: bool = option("z is not divided by √d (no-div)", default=False)

    def setup(self) -> None:
        """The gates' keys where they have their own, and a vector for each position."""
        super().setup()
        if self.gate_keys and self.value_gates:
            raise ValueError("gate_keys and value_gates exclude each other")
        if self.score_mod is not None:
            raise ValueError("position: a bias on scores cannot be given together with CoPE")
        if self.gate_keys:
            self.gate_proj = nn.Linear(self.dim, self.kv_heads * self.head_dim, bias=self.bias)
        self.embedding = nn.Parameter(torch.zeros(self.npos, self.head_dim))

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; what the gates read instead of the keys is carried beside them."""
        q, k, v = super().project(inputs)
        if self.gate_keys:
            inputs.carry("gates", self.split_heads(self.gate_proj(inputs.tokens)))
        elif self.value_gates:
            inputs.carry("gates", v)
        return q, k, v

    def score(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """Products, and z where the gates count to; only visible keys count."""
        gates, visible = inputs.carried.get("gates", k), inputs.visible(q, k)
        gate = ops.grouped_product(self.scale * q, gates.mT).sigmoid()
        if visible is not None:
            gate = gate * visible
        return super().score(q, k, inputs) + self.bias_at(q, self.count(gate))

    def count(self, gate: Tensor) -> Tensor:
        """p: gates summed from each key to the end of the row, at most npos − 1."""
        return gate.flip(-1).cumsum(-1).flip(-1).clamp(max=len(self.embedding) - 1)

    def bias_at(self, q: Tensor, p: Tensor) -> Tensor:
        """z at the fractional positions p [batch, heads, queries, keys]."""
        logits = q @ self.embedding.t() * (1.0 if self.undivided else self.scale)
        low, high = p.floor(), p.ceil()
        share = p - low
        return torch.lerp(logits.gather(-1, low.long()), logits.gather(-1, high.long()), share)
