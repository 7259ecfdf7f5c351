"""HyperAttention: the authors' function of q, k and v, with the directions and draws that it made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attlas.bases.approximation import Draws
from attlas.contract.cases import Case, Check, adapter
from attlas.layers.linear.hyper import HyperAttention


class Given(HyperAttention):
    """Draws as they were made, in the order of the calls."""

    given: list[Tensor]

    def draw(self, k: Tensor, *_: Any) -> Draws:
        ranks = self.given.pop(0).long()
        return Draws(ranks, torch.full_like(ranks, k.shape[2] / ranks.shape[-1], dtype=k.dtype).log())


class Twice(Given):
    """The float32 path, in which drawn keys of the own block count twice."""

    def elsewhere(self, ranks: Tensor, blocks: int) -> Tensor:
        return torch.ones_like(super().elsewhere(ranks, blocks))


@adapter("hyper-attention", mechanism="hyper-attention")
def hyper_attention(case: Case) -> Iterator[Check]:
    config = case.config
    q, k, v = (case.inputs[name] for name in "qkv")
    case.sizes(q, "B H N D")
    scale = config.get("scale") or "D**-0.5"
    if isinstance(scale, str):
        case.states(scale=("D**-0.5", None))
    for kind, suffix in ((Twice, ""), (Given, "_block_masked")):
        if f"o{suffix}" not in case.outs:
            continue
        layer = kind(
            config["H"] * config["D"], config["H"], head_dim=config["D"], block=config["block"],
            samples=config["sample"], projections=config["projs"], min_length=config["min_len"],
            causal=config["causal"],
        )  # fmt: skip
        if not isinstance(scale, str):
            layer.scale = scale
        layer.planes = case.inputs["lsh_proj_dir"]
        count = sum(name.startswith("sampled_") for name in case.inputs)
        layer.given = [case.inputs[f"sampled_{at}"] for at in range(count)]
        out, lse = layer.estimate(q, k, v, causal=config["causal"])
        yield case.compare(f"out.o{suffix}", out)
        if f"lse{suffix}" in case.outs:
            yield case.compare(f"out.lse{suffix}", lse[..., None])
        for name, x in (("q", q), ("k", k)):
            if not suffix and f"{name}_hash" in case.mids:
                yield case.compare(f"mid.{name}_hash", layer.hash(x))
