"""How ZAYA's compressed convolutional attention maps to ours."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights
from attlas.positions import Position, RoPE

NAMES = {
    "qk_norm.temp": "temperature", "v_proj_current": "v_current", "v_proj_delayed": "v_delayed",
    "conv_qk_depthwise": "conv_channels", "conv_qk_grouped": "conv_heads", "qkv_proj.": "",
}  # fmt: skip


class _Partial(Position):
    """Rotary positions on the first channels."""

    def __init__(self, width: int, base: float) -> None:
        super().__init__()
        self.width, self.rope = width, RoPE(width, base)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        rotated = self.rope.rotate(x[..., : self.width], positions)
        return torch.cat((rotated, x[..., self.width :]), dim=-1)


@adapter("compressed-convolutional", mechanism="compressed-convolutional")
def compressed(case: Case) -> Iterator[Check]:
    config = case.config
    layer = attlas.make(
        "cca", dim=config["dim"], heads=config["heads"], kv_heads=config["kv_heads"],
        head_dim=config["head_dim"], causal=config.get("causal", True), bias=True,
        kernels=(config["conv_kernel_depthwise"], config["conv_kernel_grouped"]),
        position=_Partial(config["rotary_dim"], config["rope_theta"]),
    )  # fmt: skip
    case.states(attention_bias="o_proj.bias" in case.params)
    weights = {}
    for name, weight in case.params.items():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        weights[name] = weight
    load_weights(layer, weights)
    x = case.inputs["x"]
    yield case.compare("out.y", layer(x))
    q, k, v = (t.transpose(1, 2) for t in layer.project(layer.prepare(x)[-1]))
    for name, ours in {"q_before_norm": q, "k_before_norm": k, "v": v}.items():
        if name in case.mids:
            yield case.compare(f"mid.{name}", ours)
    if "weights" in case.mids:
        yield case.compare("mid.weights", layer.weights(x))
