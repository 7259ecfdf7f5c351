"""Flow attention: the authors' layer projects three inputs, whose widths may differ from the model's."""

from __future__ import annotations

from collections.abc import Iterator

from einops import rearrange
from torch import Tensor
from torch.nn.functional import linear

import attlas
from attlas.contract.cases import Case, Check, adapter


@adapter("flowformer", "flowformer-causal", mechanism="flowformer")
def flowformer(case: Case) -> Iterator[Check]:
    config, params = case.config, case.params
    queries, keys, values = (case.inputs[name] for name in ("queries", "keys", "values"))
    case.sizes(queries, "batch query_length d_input")
    case.sizes(keys, "batch key_length d_input")
    case.states(d_output=params["out_projection.weight"].shape[0], dropout=("off (eval)", 0, 0.0))
    layer = attlas.make(
        "flowformer", dim=config["d_model"], heads=config["heads"], eps=config["eps"],
        causal=case.name.endswith("causal"),
    ).eval()  # fmt: skip

    def projected(name: str, x: Tensor) -> Tensor:
        return linear(x, *(params[f"{name}_projection.{part}"] for part in ("weight", "bias")))

    q, k, v = projected("query", queries), projected("key", keys), projected("value", values)
    # Ours takes two inputs of the model's width, so its stages run from behind the projections.
    _, _, _, inputs = layer.to(q.dtype).prepare(q, None if layer.causal else k)
    heads = layer.attend(*(layer.split_heads(x) for x in (q, k, v)), inputs)
    yield case.compare("out.y", projected("out", rearrange(heads, "b h t d -> b t (h d)")))
