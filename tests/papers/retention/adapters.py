"""Retention: the bare recurrence of queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import attlas
from attlas import ops
from attlas.contract.cases import Case, Check, adapter
from attlas.inputs import Inputs


@adapter("retention", mechanism="retention")
def retention(case: Case) -> Iterator[Check]:
    q, k, v = (case.inputs[name] for name in "qkv")
    case.sizes(q, "batch heads length key_dim")
    state = case.inputs.get("initial_state")
    case.states(value_dim=v.shape[-1], initial_state=state is not None)
    heads, tokens, width = q.shape[1:]
    layer = attlas.make(
        "retention", dim=heads * width, heads=heads, head_dim=width, value_dim=v.shape[-1], causal=True
    ).to(q.dtype)  # fmt: skip
    for form in ("step", "chunked", "parallel"):
        out, last = ops.recurrence(
            q, k, v, log_decay=layer.log_decay, scale=layer.scale, initial_state=state, form=form
        )
        yield case.compare("out.o", out)
        if "final_state" in case.outs and last is not None:
            yield case.compare("out.final_state", last)
    if state is None:
        at = torch.arange(tokens)
        inputs = Inputs(torch.zeros(len(q), tokens, layer.dim), None, at, at, pairs=layer.pattern)
        yield case.compare("out.o", layer.attend(q, k, v, inputs))
