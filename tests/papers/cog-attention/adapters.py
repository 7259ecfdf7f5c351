"""How the published cog attention's weights and configurations map to ours."""

from __future__ import annotations

from collections.abc import Iterator

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights
from reference.rope import rope_of


@adapter("cog", mechanism="cog-attention")
def cog(case: Case) -> Iterator[Check]:
    config = case.config
    position = rope_of(config.get("rope"), config["head_dim"])
    layer = attlas.make(
        "cog-attention", dim=config["dim"], heads=config["n_heads"], head_dim=config["head_dim"],
        causal=config.get("causal", False), position=position,
    )  # fmt: skip
    names = {"q_proj": "qw", "k_proj": "kw", "v_proj": "vw", "o_proj": "ow"}
    load_weights(layer, {f"{ours}.weight": case.params[theirs].T for ours, theirs in names.items()})
    x, visible = case.inputs["x"], case.inputs.get("mask")
    case.states(documents=False if visible is None else (False, True))  # the mask parts them
    mask = None if visible is None else visible[:, None].bool()
    yield case.compare("out.y", layer(x, mask=mask))
    if "weights" in case.mids:
        yield case.compare("mid.weights", layer.weights(x, mask=mask))
