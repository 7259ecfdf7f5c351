"""Fastmax: the published function is of queries, keys and values, and divides by a sequence's norm."""

from __future__ import annotations

from collections.abc import Iterator

import attlas
from attlas.contract.cases import Case, Check, adapter


@adapter("fastmax", mechanism="fastmax")
def fastmax(case: Case) -> Iterator[Check]:
    config = case.config
    q, k, v = (case.inputs[name] for name in "qkv")
    case.sizes(q, "B H N D")
    case.states(dropout=(0, 0.0))
    case.without_effect("config.temperature")  # set to 1 inside, whatever is asked for
    coefficients = [config[name] for name in ("a0", "a1", "a2") if name in config]
    if not config["normalize"]:
        case.without_effect("config.lim")
    else:
        # By the largest norm of all tokens, those to come included.
        q, k = (config["lim"] * x / x.norm(dim=-1).amax(-1)[..., None, None] for x in (q, k))
    for form in case.outs:
        order, reach = form.split("_")
        layer = attlas.make(
            "fastmax", dim=q.shape[1] * q.shape[3], heads=q.shape[1], causal=reach == "causal",
            coefficients=coefficients[: int(order[1:]) + 1], norm=False,
        ).eval()  # fmt: skip
        x = v.transpose(1, 2).flatten(2)  # whose length and padding the stages behind look at
        _, _, _, inputs = layer.to(v.dtype).prepare(x)
        yield case.compare(f"out.{form}", layer.attend(q, k, v, inputs))
