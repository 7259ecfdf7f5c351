"""How published evictions by key norm map to ours."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from attlas.contract.cases import Case, Check, adapter
from attlas.parts.evict.key_norm import KeyNorm
from reference.model import on_model
from reference.policies import press, run_layer


def key_norm(config: dict[str, Any]) -> KeyNorm:
    return KeyNorm(1.0 - config["compression_ratio"], skip_layers=())


@adapter("press-knorm", mechanism="key-norm-eviction")
def one_layer(case: Case) -> Iterator[Check]:
    return press(case, key_norm(case.config))


@adapter("model-knorm", mechanism="key-norm-eviction")
def whole_model(case: Case) -> Iterator[Check]:
    return on_model(case, key_norm)


@adapter("l2-norm", mechanism="key-norm-eviction")
def l2_norm(case: Case) -> Iterator[Check]:
    """Kept pairs in order of norm; ours are in order of position."""
    keys, values = case.inputs["k"], case.inputs["v"]
    tokens = keys.shape[2]
    case.sizes(keys, "B heads T head_dim")
    count = math.ceil(case.config["keep_ratio"] * tokens)
    policy = KeyNorm(tokens=count, skip_layers=())
    scores, kept = run_layer(policy, torch.zeros_like(keys), keys, values)
    order = scores.gather(-1, kept).argsort(dim=-1, descending=True)
    at = kept.gather(-1, order)[..., None].expand(-1, -1, -1, keys.shape[-1])
    yield case.compare("out.k", keys.gather(2, at))
    yield case.compare("out.v", values.gather(2, at))
