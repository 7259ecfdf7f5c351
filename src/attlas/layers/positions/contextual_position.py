"""Contextual position encoding (CoPE): positions are counted by gates that read the text.

    g_ij = σ(q_i·k_j / √d)                      which keys count
    p_ij = Σ_{l=j..i} g_il, at most npos − 1    how many since key j
    z_i[n] = q_i·e[n],  z_i(p) linear between ⌊p⌋ and ⌈p⌉
    weights = softmax((q_i·k_j + z_i(p_ij)) / √d)

Cost: the scores twice more, and memory quadratic in length (the gates' sums need whole rows).
Reduces to learned relative positions when every gate is 1, to none when e is 0, as it starts.
Source: "Contextual Position Encoding: Learning to Count What's Important". The paper writes the
scores and gates without the 1/√d, which the authors' code puts on both, as here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.masks import Mask
from attlas.ops import as_dense


@mechanism("contextual-position-encoding", aliases=("cope",), reduces_to=Reduction(
    "softmax", {}, lambda cope, plain: plain.load_state_dict(cope.state_dict(), strict=False)
))  # fmt: skip
class ContextualPosition(Attention):
    """Attention with contextual positions.

    Args:
        npos: positions that can be told apart; all beyond share the last.
        gate_keys: a key projection of the gates' own ("sep-keys").
        value_gates: gates from q·v instead of q·k ("val-gates").
        undivided: z is not divided by √d ("no-div").
    """

    claims = (
        Claim(
            "counts what matters, also at distances that training did not show",
            ours="contextual-position-encoding(position='none')",
            against=("softmax", "softmax(position='none')"),
            task="counting",
            split="more passes",
        ),
    )

    memory_law = "quadratic"

    def __init__(
        self, dim: int, heads: int = 8, *args: Any, npos: int = 64, gate_keys: bool = False,
        value_gates: bool = False, undivided: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        if npos < 1:
            raise ValueError(f"npos must be at least 1, got {npos}")
        if gate_keys and value_gates:
            raise ValueError("gate_keys and value_gates exclude each other")
        self.gate_keys, self.value_gates, self.undivided = gate_keys, value_gates, undivided
        super().__init__(dim, heads, *args, **options)
        self.embedding = nn.Parameter(torch.zeros(npos, self.head_dim))

    def make_projections(self) -> None:
        """The plain projections, and the gates' keys where they have their own."""
        super().make_projections()
        if self.gate_keys:
            self.gate_proj = nn.Linear(self.dim, self.kv_heads * self.head_dim, bias=self.bias)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; what gates read travels beside the keys, into the cache too."""
        q, k, v = super().project(inputs)
        if self.gate_keys:
            gate = self.gate_proj(inputs.tokens)
            k = torch.cat((k, self.split_heads(gate)), dim=-1)
        elif self.value_gates:
            k = torch.cat((k, v), dim=-1)
        return q, k, v

    def position(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Another position encoding, where one was asked for, turns queries and keys alone."""
        keys, gates = k[..., : self.head_dim], k[..., self.head_dim :]
        q, keys = super().position(q, keys, inputs)
        return q, torch.cat((keys, gates), dim=-1)

    def weigh(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """Weights, the gates seeing what the mask shows."""
        if self.score_mod is not None:
            raise ValueError("position: a bias on scores cannot be given together with CoPE")
        keys, gates = k[..., : self.head_dim], k[..., self.head_dim :]
        gates = gates if gates.shape[-1] else keys
        visible = as_dense(mask, q.shape[2], k.shape[2], k.shape[2] - q.shape[2], q.device)
        gate = (self.scale * q @ ops.repeated(gates, q.shape[1]).transpose(-1, -2)).sigmoid()
        if visible is not None:
            gate = gate * visible
        scores = self.score(q, keys, inputs) + self.bias_at(q, self.count(gate))
        return self.normalize(
            scores if visible is None else scores.masked_fill(~visible, -torch.inf)
        )

    def count(self, gate: Tensor) -> Tensor:
        """p: gates summed from each key to the end of the row, at most npos − 1."""
        return gate.flip(-1).cumsum(-1).flip(-1).clamp(max=len(self.embedding) - 1)

    def bias_at(self, q: Tensor, p: Tensor) -> Tensor:
        """z at the fractional positions p [batch, heads, queries, keys]."""
        logits = q @ self.embedding.t() * (1.0 if self.undivided else self.scale)
        low, high = p.floor(), p.ceil()
        share = p - low
        return torch.lerp(logits.gather(-1, low.long()), logits.gather(-1, high.long()), share)
