"""How Loki's published function maps to ours."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attlas.calibration import Calibration
from attlas.contract.cases import Case, Check, adapter
from attlas.parts.select.loki import Loki
from reference.selection import read


@adapter("loki", mechanism="loki-low-rank-keys")
def loki(case: Case) -> Iterator[Check]:
    """Query after query, each over the keys that it may see, all of them packed."""
    config = case.config
    q, k, v = (case.inputs[name] for name in "qkv")
    tokens = k.shape[2]
    case.sizes(q, "B heads T head_dim")
    top = config["top_k"]
    part = Loki(tokens=top if top > 1 else int(top * tokens), rank=config["top_r"])
    components = {"0.components": case.params["pca_components"].reshape(-1, *k.shape[-1:] * 2)}
    part.found = Calibration("", {}, components)
    weights, heads = torch.zeros(*q.shape[:3], tokens), torch.zeros_like(q)
    for i in range(q.shape[2]):
        seen = i + 1 if config.get("causal", True) else tokens
        found = read(part, q[:, :, i : i + 1], k[:, :, :seen], v[:, :, :seen])[1:]
        weights[:, :, i, :seen], heads[:, :, i] = (x[:, :, 0] for x in found)
    if "attn" in case.mids:
        yield case.compare("mid.attn", weights[: len(case.mids["attn"])])
    yield case.compare("out.o", heads)
