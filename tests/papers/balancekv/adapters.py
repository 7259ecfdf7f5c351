"""How BalanceKV's published walk maps to ours."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attlas.contract.cases import Case, Check, adapter
from attlas.parts.evict.balance_kv import BalanceKV


@adapter("balancekv", mechanism="balancekv")
def balancekv(case: Case) -> Iterator[Check]:
    """Kept indices, heaviest first, and weights of the walk for given random numbers."""
    config = case.config
    part = BalanceKV(
        0.5 ** config["iterations"],
        block=config["block_size"],
        gamma=config["gamma"],
        temperature=config["temp"],
        beta=config["beta"],
        use_values=config.get("with_values", True),
    )
    k = case.inputs["k"]
    case.sizes(k, "B heads n head_dim")
    v = case.inputs.get("v", k)
    count = torch.full((k.shape[0],), k.shape[2])
    kept, weights = part.reduce(k, v, count, lambda t, blocks: case.inputs[f"rand{t}"])
    yield case.compare("out.indices", kept)
    yield case.compare("out.weights", weights)
