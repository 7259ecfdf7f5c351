"""CoulGAT: features before nodes there, and layers that widen or narrow; here both are padded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import pad

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights


@adapter("coulgat", mechanism="coulgat")
def coulgat(case: Case) -> Iterator[Check]:
    params, x = case.params, case.inputs["x"].mT
    hidden, features = params["W"].shape
    nodes = x.shape[1]
    case.states(nodes=nodes, features=features, hidden=hidden)
    dim = max(hidden, features)
    layer = attlas.make(
        "coulgat", dim=dim, heads=1, nodes=nodes, slope=case.config.get("slope", 0.2)
    )
    wider = dim - hidden
    load_weights(layer, {
        "v_proj.weight": pad(params["W"], (0, dim - features, 0, wider)),
        "a": pad(params["a"], (0, wider))[None],
        "b": pad(params["b"].mT, (0, wider))[None],
        # Without learnt powers the adjacency is taken as it is.
        "power": params.get("power", torch.ones(nodes, nodes).to(x))[None],
    })  # fmt: skip
    x, extras = pad(x, (0, dim - features)), {"adjacency": case.inputs["potential"]}
    yield case.compare("out.y", layer(x, **extras)[..., :hidden].mT)
    if "WH" in case.mids:
        yield case.compare("mid.WH", layer.prepare(x, extras=extras)[2][:, 0, :, :hidden].mT)
    if "weights" in case.mids:
        yield case.compare("mid.weights", layer.weights(x, **extras)[:, 0])
