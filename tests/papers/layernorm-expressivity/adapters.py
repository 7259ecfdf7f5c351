"""How the published factorized LayerNorm maps to ours: the same parts, switched on and off."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attlas.contract.cases import Case, Check, adapter, load_weights
from attlas.studies.layernorm_expressivity import FactorizedLayerNorm

#: The published outputs, and the parts (projection, scaling) that each has.
PARTS = {
    "full": (True, True),
    "projection": (True, False),
    "scaling": (False, True),
    "none": (False, False),
}


@adapter("factorized-layernorm", mechanism="layernorm-expressivity")
def factorized(case: Case) -> Iterator[Check]:
    affine = case.config["elementwise_affine"]
    case.sizes(case.inputs["x"], "B T dim")
    weights = {name: case.params[name] for name in ("gain", "bias")} if affine else {}
    for name, (projection, scaling) in PARTS.items():
        layer = FactorizedLayerNorm(
            case.config["dim"], projection=projection, scaling=scaling, affine=affine
        )
        load_weights(layer, weights)
        yield case.compare(f"out.{name}", layer(case.inputs["x"]))
    # The quirk that the case tells: without an epsilon, LayerNorm itself is missed by some 5e-6.
    exact = torch.nn.functional.layer_norm(
        case.inputs["x"], (case.config["dim"],), *weights.values(), eps=0.0
    )
    yield case.compare("out.full", exact)
