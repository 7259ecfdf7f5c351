"""KDEformer: the authors' function of q, k and v, without a scale, with the draws that it made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attlas.bases.approximation import Draws
from attlas.contract.cases import Case, Check, adapter
from attlas.layers.linear.kdeformer import KDEformer


class Given(KDEformer):
    """Keys as they were drawn; the layer's own chances of them."""

    sampled: Tensor
    largest: Tensor

    def shares(self, v: Tensor) -> Tensor:
        """By the eigenvalue that the program's power method found."""
        return v.norm(dim=-1) / self.largest[..., None]

    def draw(self, k: Tensor, chances: Tensor | None, rng: Any) -> Draws:
        assert chances is not None
        self.probabilities = torch.nn.functional.normalize(chances + 1 / k.shape[2], p=1, dim=-1)
        ranks = self.sampled.long()
        return Draws(ranks, -(ranks.shape[-1] * self.probabilities.gather(-1, ranks)).log())


@adapter("kdeformer", mechanism="kdeformer")
def kdeformer(case: Case) -> Iterator[Check]:
    config = case.config
    q, k, v = (case.inputs[name] for name in "qkv")
    layer = Given(
        config["H"] * config["D"], config["H"], head_dim=config["D"], block=config["bucket"],
        samples=config["sample"], projections=config["projs"],
    )  # fmt: skip
    layer.scale, layer.planes = 1.0, case.inputs["lsh_proj_dir"]
    layer.sampled = case.inputs["sampled"]
    layer.largest = case.inputs["value_spectral_norm_sq"]
    case.sizes(q, "B H N D")
    case.states(E=v.shape[-1])
    for name, x in (("q", q), ("k", k)):
        order = layer.hash(x).argsort(dim=-1, stable=True)
        if f"{name}_sort_idx" in case.inputs and not torch.equal(order, case.inputs[f"{name}_sort_idx"]):
            raise ValueError(f"{name} is sorted in another order")
    shares = layer.shares(torch.cat((v, torch.ones_like(v[..., :1])), dim=-1))
    out, _ = layer.estimate(q, k, v, shares)
    yield case.compare("out.o", out)
    if "sampling_probabilities" in case.mids:
        yield case.compare("mid.sampling_probabilities", layer.probabilities)
