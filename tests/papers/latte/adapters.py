"""Latte: the authors' matrices stand inputs first, and their L counts the latents of all heads."""

from __future__ import annotations

from collections.abc import Iterator

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights

FORMS = {"causal": True, "bidirectional": False}


@adapter("latte", mechanism="latte")
def latte(case: Case) -> Iterator[Check]:
    config, params = case.config, case.params
    case.sizes(case.inputs["x"], "B N D")
    names = {"q_proj": "Wq", "k_proj": "Wk", "v_proj": "Wv", "o_proj": "o_proj"}
    for form, causal in FORMS.items():
        if form not in case.outs:
            continue
        layer = attlas.make(
            "latte", dim=config["D"], heads=config["H"], latents=config["L"] // config["H"],
            causal=causal,
        )  # fmt: skip
        load_weights(layer, {f"{ours}.weight": params[theirs].T for ours, theirs in names.items()})
        yield case.compare(f"out.{form}", layer(case.inputs["x"]))
