"""MoBA: the authors' naive form, whose queries, keys and values are given."""

from __future__ import annotations

from collections.abc import Iterator

from attlas.contract.cases import Case, Check, adapter
from reference.given import attended


@adapter("moba", mechanism="moba")
def moba(case: Case) -> Iterator[Check]:
    config, (q, k, v) = case.config, (case.inputs[name] for name in "qkv")
    case.sizes(q, "B heads T head_dim")
    case.states(causal=True, kv_heads=k.shape[1])
    found = attended("moba", q, k, v, block=config["chunk_size"], topk=config["topk"])
    yield case.compare("out.o", found)
