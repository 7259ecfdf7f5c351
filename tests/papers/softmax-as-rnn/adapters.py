"""Softmax as a recurrence: the ablations of kernel and divisor, each through the same projections."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import normalize

import attlas
from attlas import ops
from attlas.contract.cases import Case, Check, adapter, load_weights
from attlas.positions import Position

MOST = 5.0
#: Published name -> options.
KINDS = {
    "softmax_divs": {"order": None, "divisor": "length", "clamp": MOST},
    "softmax_gate": {"order": None, "divisor": "none", "clamp": MOST, "gate": True},
    "softmax_divS_gate": {"order": None, "divisor": "length", "clamp": MOST, "gate": True},
    "softmax_divS_norm": {"order": None, "divisor": "length", "clamp": MOST, "norm": True},
    "linear_elu": {"kernel": "elu"},
    "linear_relu": {"kernel": "relu"},
}


class Given(Position):
    """The rotation whose cosines and sines a case gives."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        super().__init__()
        self.cos, self.sin = cos, sin

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Halves against each other."""
        first, second = x.chunk(2, dim=-1)
        rotated = torch.cat((-second, first), dim=-1)
        return x * self.cos[:, None] + rotated * self.sin[:, None]


@adapter("softmax-attention-rnn-ablations", mechanism="softmax-as-rnn")
def softmax_rnn(case: Case) -> Iterator[Check]:
    x, params = case.inputs["x"], case.params
    case.sizes(x, "B N C")

    def made(**options: object) -> nn.Module:
        layer = attlas.make(
            "softmax-as-rnn", dim=case.config["C"], heads=case.config["H"], causal=True,
            position=Given(case.inputs["cos"], case.inputs["sin"]), **options,
        )  # fmt: skip
        names = {f"{n}_proj.weight": f"{n}_proj.weight" for n in "qkvo"}
        if "gate" in options:
            names |= {f"gate_proj.{n}": f"out_gate_proj.{n}" for n in ("weight", "bias")}
        if "norm" in options:
            names["norm.weight"] = "out_norm.weight"
        load_weights(layer, {ours: params[theirs] for ours, theirs in names.items()})
        return layer

    for name, options in KINDS.items():
        if name in case.outs:
            yield case.compare(f"out.{name}", made(**options)(x))
    plain = made(order=None, divisor="none", clamp=MOST)
    q, k, v, inputs = plain.prepare(x)
    if "softmax_clamp_denom" in case.outs:  # a sum of at least 1
        weights = plain.weigh(q, k, inputs)
        heads = weights / weights.sum(-1, keepdim=True).clamp(min=1) @ v
        yield case.compare("out.softmax_clamp_denom", plain.output(heads, inputs))
    if "linear_cosine" in case.outs:  # normalised over heads, values by how many came before each
        ahead = rearrange(inputs.positions + 1.0, "... t -> ... t 1")
        v = v / ahead ** params["norm_const"].sigmoid()
        heads, _ = ops.recurrence(normalize(q, dim=1), normalize(k, dim=1), v)
        yield case.compare("out.linear_cosine", plain.output(heads, inputs))
