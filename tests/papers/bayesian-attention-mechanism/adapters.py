"""How the published Bayesian attention's weights map to ours."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import attlas
from attlas import ops
from attlas.contract.cases import Case, Check, adapter, load_weights


@adapter("bayesian-positional-prior", mechanism="bayesian-attention-mechanism")
def bayesian(case: Case) -> Iterator[Check]:
    config = case.config
    layer = attlas.make(
        "bayesian-attention-mechanism", dim=config["dim"], heads=config["n_heads"],
        kv_heads=config.get("n_kv_heads"), head_dim=config.get("head_dim"),
        causal=config.get("causal", True), eps=config.get("eps", 1e-5),
    )  # fmt: skip
    prior = layer.position_encoding
    if "initial_scale" in case.mids:
        theirs = case.mids["initial_scale"]
        yield case.compare("mid.initial_scale", prior.scale.exp().reshape(theirs.shape))
    weights = {f"{n}_proj.weight": case.params[f"w{n}.weight"] for n in "qkvo"}
    for name in ("scale", "shape", "loc"):
        weights[f"position_encoding.{name}"] = case.params[f"prior.{name}"].flatten()
    load_weights(layer, weights)
    x = case.inputs["x"]
    yield case.compare("out.y", layer(x))
    if "log_prior" in case.mids:
        theirs = case.mids["log_prior"]
        zeros = torch.zeros(1, config["n_heads"], x.shape[1], x.shape[1], dtype=x.dtype)
        ours = prior.score_mod(zeros, *ops.indices(zeros, 0))
        yield case.compare("mid.log_prior", ours.reshape(theirs.shape))
    if "weights" in case.mids:
        yield case.compare("mid.weights", layer.weights(x))
