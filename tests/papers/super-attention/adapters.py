"""How a third party's optimised, efficient and super attention maps to ours."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights

VARIANTS = {
    "optimised-attention": "Optimised", "efficient-qk-attention": "Efficient",
    "super-attention": "Super",
}  # fmt: skip


def _run(case: Case, name: str, **options: int) -> Iterator[Check]:
    config, params = case.config, case.params
    layer = attlas.make(
        name, dim=config["dim"], heads=config["heads"], head_dim=config["head_dim"], bias=True,
        causal=config.get("causal", False), **options,
    )  # fmt: skip
    weights = {}
    for what in ("weight", "bias"):
        for ours, theirs in (("q_proj", "W_q"), ("k_proj", "W_k")):
            parts = [params.get(f"heads.{h}.{theirs}.{what}") for h in range(config["heads"])]
            if parts[0] is not None:
                weights[f"{ours}.{what}"] = torch.cat(parts)
        for ours, theirs in (("o_proj", "W_o"), ("kernel", "W_a")):
            if f"{theirs}.{what}" in params:
                weights[f"{ours}.{what}"] = params[f"{theirs}.{what}"]
    load_weights(layer, weights)
    x = case.inputs["x"]
    case.sizes(x, "_ length dim")
    case.states(variant=VARIANTS[name])
    yield case.compare("out.y_softmax_over_keys", layer(x))
    # The program as released, whose softmax runs over the queries by mistake.
    q, k, v, inputs = layer.prepare(x)
    scores, visible = layer.score(q, k, inputs), inputs.visible(q, k)
    scores = scores if visible is None else scores.masked_fill(~visible, -torch.inf)
    heads = layer.aggregate(scores.softmax(-2), v, inputs)
    yield case.compare("out.y", layer.output(heads, inputs))


@adapter("optimised-attention", mechanism="optimised-attention")
def optimised(case: Case) -> Iterator[Check]:
    yield from _run(case, "optimised-attention")


@adapter("efficient-attention-qonly", mechanism="efficient-qk-attention")
def efficient(case: Case) -> Iterator[Check]:
    yield from _run(case, "efficient-qk-attention")


@adapter("super-attention", mechanism="super-attention")
def super_(case: Case) -> Iterator[Check]:
    yield from _run(case, "super-attention", length=case.config["length"])
