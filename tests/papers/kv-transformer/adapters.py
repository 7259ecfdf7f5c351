"""How the author's key-value attention maps to ours."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from attlas.contract.cases import Case, Check, adapter, load_weights
from attlas.layers.heads.kv_transformer import KeyValue
from attlas.positions import ScoreMod
from attlas.positions.base import additive


class _Tabled(KeyValue):
    """Features of pairs from a table instead of sines and cosines."""

    table: Tensor

    def shares(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        nothing = torch.zeros(positions.shape)
        return nothing, nothing

    @property
    def score_mod(self) -> ScoreMod:
        mapped = (self.table @ self.pair_map.weight[0]).squeeze()

        @additive
        def added(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return score + mapped[q_idx, kv_idx]

        return added


@adapter("key-value", mechanism="kv-transformer")
def key_value(case: Case) -> Iterator[Check]:
    config, params = case.config, case.params
    table = case.inputs.get("position_table") if config.get("position") else None
    layer = (KeyValue if table is None else _Tabled)(
        config["dim"], config["heads"], head_dim=config["head_dim"], bias=True,
        causal=config.get("causal", False),
        position_dim=0 if table is None else config["position_dim"],
    )  # fmt: skip
    if table is None:
        case.without_effect("config.position_dim")
    weights = {}
    for what in ("weight", "bias"):
        if f"kv_proj.{what}" in params:
            heads = rearrange(
                params[f"kv_proj.{what}"], "(h two d) ... -> two (h d) ...", two=2,
                d=config["head_dim"],
            )  # fmt: skip
            weights |= {f"k_proj.{what}": heads[0], f"v_proj.{what}": heads[1]}
        if f"o_proj.{what}" in params:
            weights[f"o_proj.{what}"] = params[f"o_proj.{what}"]
    if table is not None:
        # Its bias adds the same to all logits, which a softmax does not see.
        weights["pair_map.weight"] = params["map_pos.weight"]
        case.without_effect("param.map_pos.bias")
        layer.table = table
    load_weights(layer, weights)
    x = case.inputs["x"]
    yield case.compare("out.y", layer(x))
    if "weights" in case.mids:
        yield case.compare("mid.weights", layer.weights(x))
