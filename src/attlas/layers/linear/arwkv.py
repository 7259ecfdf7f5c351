"""RWKV-7's time mixing, as ARWKV puts it in attention's place: a state that is rotated, decayed, written.

    S_t = (diag(e^{g_t}) − (κ̂_t ⊙ η_t) κ̂_tᵀ) S_{t−1} + k̃_t v_tᵀ          y_t = S_tᵀ r_t
    x^i = x_t + (x_{t−1} − x_t) ⊙ μ_i     for each i of r, w, k, v, a, g
    g = −e^{−½} σ(w_0 + tanh(x^w W_1) W_2)      η = σ(a_0 + x^a A_1 A_2)
    κ̂ = (k ⊙ ξ) / ‖k ⊙ ξ‖                       k̃ = k ⊙ (1 + (η − 1) ⊙ α)
    out = W_O ( (norm(y) + (r·(ρ ⊙ k̃)) v) ⊙ G )         G = 1 + σ(x^g G_1) G_2

What a state holds under κ̂ is taken away by η, each channel by its own share, so that states can swap
and permute, which an additive state cannot. ARWKV's gate begins at 1 and its norm, one group a head, is
optional; `gate="rwkv7"` and `norm=True` give RWKV-7's own. With `value_residual`, for layers behind the
first, values move towards those of the first layer, which are given as `v_first`:
v ← v + (v_first − v) σ(ν_0 + x^v V_1 V_2).

Cost: 4·n·d² multiply-adds a head, and n·d·c for the equations of chunks of c tokens; memory linear in n,
one state of d × d a head and one token while decoding.
Reduces to no registered mechanism.
Source: "ARWKV: Pretrain is not what we need, an RNN-Attention-Based Language Model Born from
Transformer"; initial values are RWKV-7's by layer. With grouped keys, a group shares k, v, w and a. A
head with a norm has two maps of weights, side by side: of the state, and of the bonus behind the norm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from attlas import ops
from attlas.bases.packing import token_before
from attlas.bases.recurrent import Gates, RecurrentAttention
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.options import option

#: Most that a log decay is, −e^{−½}.
FASTEST = -0.6065306597126334


class LowRank(nn.Module):
    """b + f(x W_1) W_2, with W_1 zero at first.

    Args:
        into: width of x.
        rank: width between.
        out: width of what it gives.
        bias: b; None for none.
    """

    def __init__(self, into: int, rank: int, out: int, bias: Tensor | None) -> None:
        super().__init__()
        self.bias: Tensor | None
        self.down = nn.Parameter(torch.zeros(into, rank))
        self.up = nn.Parameter(nn.init.orthogonal_(torch.empty(rank, out), gain=0.1))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))

    def forward(self, x: Tensor, activation: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The map of x, `activation` between the two."""
        inner = x @ self.down
        y: Tensor = (inner if activation is None else activation(inner)) @ self.up
        return y if self.bias is None else y + self.bias


@mechanism("arwkv-rwkv7", aliases=("rwkv7-time-mix", "arwkv"))
class ARWKV(RecurrentAttention):
    """RWKV-7's time mixing."""

    claims = (
        Claim(
            "its state follows swaps and permutations, which an additive state cannot",
            against=("linear-attention", "gated-linear-attention"),
            task="swaps(items=3, length=12)", steps=800, seeds=2,
        ),
    )  # fmt: skip
    supports = replace(
        RecurrentAttention.supports, bidirectional=False, cross=False, position=False,
        masks="padding", extras=("v_first",),
    )  # fmt: skip
    beyond = (
        "project: tokens are mixed with those before them, as in RWKV-7",
        "output: the gate, and the norm where there is one, are RWKV-7's",
    )
    normalized = False

    gate: Literal["arwkv", "rwkv7", "none"] = option(
        "what gates outputs; 'rwkv7' leaves out the 1", default="arwkv"
    )
    norm: bool = option("whether each head's output is normalised", default=False)
    norm_eps: float = option("added to the variance of that norm", default=64e-5, at_least=0)
    value_residual: bool = option("whether values move towards v_first", default=False)
    ranks: tuple[int, int, int, int] = option(
        "ranks of the maps of decays, η, values and the gate", default=(64, 64, 32, 128),
        at_least=1,
    )  # fmt: skip
    layers: int | None = option(
        "layers of the model, of which this is number layer_idx, for initial values; unless given, "
        "all begin as the first", default=None, at_least=1,
    )  # fmt: skip

    def setup(self) -> None:
        """Initial values, mixing with the token before, and the low-rank maps.

        Raises:
            ValueError: a layer that is none of `layers`.
        """
        super().setup()
        if self.layers is not None and self.layer_idx >= self.layers:
            raise UserError(
                f"layers must be more than layer_idx={self.layer_idx}, got {self.layers}"
            )
        dim, inner, width = self.dim, self.kv_heads * self.head_dim, self.head_dim
        for projection, spread in ((self.q_proj, 0.5), (self.k_proj, 0.05), (self.v_proj, 0.5)):
            nn.init.uniform_(projection.weight, -spread * dim**-0.5, spread * dim**-0.5)
        nn.init.zeros_(self.o_proj.weight)
        depth = 0.0 if self.layers is None else self.layer_idx / max(self.layers - 1, 1)
        rest = 1.0 if self.layers is None else 1.0 - self.layer_idx / self.layers
        share = torch.arange(dim) / dim
        powers = {"r": (0.2, 0.0), "w": (0.9, 0.0), "k": (0.9, 0.4), "v": (0.4, 0.6),
                  "a": (0.9, 0.0), "g": (0.2, 0.0)}  # fmt: skip
        if self.gate == "none":
            del powers["g"]
        self.mix = nn.ParameterDict({
            name: 1.0 - share.pow(power * rest) - shift * depth
            for name, (power, shift) in powers.items()
        })  # fmt: skip
        of_decay, of_step, of_value, of_gate = self.ranks
        speed = torch.linspace(0, 1, inner) ** (0.85 + depth**0.5)
        self.decay = LowRank(dim, of_decay, inner, -6.5 + 5 * speed)
        self.step = LowRank(dim, of_step, inner, torch.zeros(inner))
        if self.value_residual:
            self.toward_first = LowRank(dim, of_value, inner, torch.ones(inner))
        if self.gate != "none":
            self.out_gate = LowRank(dim, of_gate, self.heads * width, None)
        self.kappa = nn.Parameter(torch.full((self.kv_heads, 1, width), 0.85))
        self.alpha = nn.Parameter(torch.ones(self.kv_heads, 1, width))
        self.rho = nn.Parameter(torch.zeros(self.heads, 1, width))
        if self.norm:
            self.norm_weight = nn.Parameter(torch.ones(self.heads, 1, width))
            self.norm_bias = nn.Parameter(torch.zeros(self.heads, 1, width))

    def mixed(self, name: str, inputs: Inputs) -> Tensor:
        """The tokens with some of those before them."""
        before, _ = token_before(inputs.x, inputs.valid_now, inputs.recall("previous"))
        mixed: Tensor = inputs.x + (before - inputs.x) * self.mix[name]
        return mixed

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """r, k and v; κ̂ is noted for the state.

        Raises:
            ValueError: no `v_first` for values that move towards it.
        """
        of_values = self.mixed("v", inputs)
        v = self.v_proj(of_values)
        if self.value_residual:
            if (first := inputs.extras.get("v_first")) is None:
                raise UserError("v_first must be given to a layer with value_residual=True")
            v = v + (first - v) * self.toward_first(of_values).sigmoid()
        q, k, v = (
            self.split_heads(x)
            for x in (self.q_proj(self.mixed("r", inputs)), self.k_proj(self.mixed("k", inputs)), v)
        )
        inputs.notes["removed"] = ops.unit(k * self.kappa)
        return q, k, v

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """r and k̃."""
        return q, k * (1 + (self.steps(inputs) - 1) * self.alpha)

    def steps(self, inputs: Inputs) -> Float[Tensor, "batch kv_heads tokens width"]:
        """η."""
        return self.split_heads(self.step(self.mixed("a", inputs)).sigmoid())

    def gates(self, k: Tensor, inputs: Inputs) -> Gates:
        """Decays of every channel, and what is taken away under κ̂."""
        decay = FASTEST * self.decay(self.mixed("w", inputs), torch.tanh).sigmoid()
        removed = inputs.notes["removed"]
        return {
            "log_decay": self.split_heads(decay),
            "low_rank": (removed * self.steps(inputs), -removed),
        }

    def recur(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """The recurrence, and the bonus of the token itself: beside it where a norm comes between."""
        out = super().recur(q, k, v, inputs)
        return self.joined(out, self.bonus(q, k, inputs) * ops.repeated(v, q.shape[1]))

    def weigh(self, q: Tensor, k: Tensor, inputs: Inputs) -> Tensor:
        """The state's map and the bonus, which is its diagonal or a map beside it."""
        weights = super().weigh(q, k, inputs)
        return self.joined(weights, torch.diag_embed(self.bonus(q, k, inputs)[..., 0]))

    def bonus(self, q: Tensor, k: Tensor, inputs: Inputs) -> Float[Tensor, "batch heads tokens 1"]:
        """r·(ρ ⊙ k̃)."""
        q, k, _ = self.terms(q, k, inputs)
        return (q * k * self.rho).sum(-1, keepdim=True)

    def joined(self, state: Tensor, bonus: Tensor) -> Tensor:
        """Their sum; or of each head the two side by side."""
        if not self.norm:
            return state + bonus
        return torch.stack((state, bonus), dim=2).flatten(1, 2)

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Heads normalised and gated, where they are, and projected; the last token is remembered."""
        if self.norm:
            state, bonus = heads.unflatten(1, (-1, 2)).unbind(2)
            state = layer_norm(state, state.shape[-1:], eps=self.norm_eps)
            heads = state * self.norm_weight + self.norm_bias + bonus
        if self.gate != "none":
            gate = self.out_gate(self.mixed("g", inputs), torch.sigmoid)
            gate = gate + 1 if self.gate == "arwkv" else gate
            heads = heads * rearrange(gate, "b t (h d) -> b h t d", d=self.head_dim)
        if inputs.cache is not None:
            _, last = token_before(inputs.x, inputs.valid_now, inputs.recall("previous"))
            # By itself: a view would hold all tokens of the prompt, and lie otherwise than a step's.
            inputs.remember("previous", last.clone(memory_format=torch.contiguous_format))
        return super().output(heads, inputs)
