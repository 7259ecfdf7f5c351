"""Gated linear attention: the bare recurrence."""

from __future__ import annotations

from collections.abc import Iterator

from attlas import ops
from attlas.contract.cases import Case, Check, adapter


@adapter("gated-linear-attention", mechanism="gated-linear-attention")
def gated_linear(case: Case) -> Iterator[Check]:
    q, k, v, g = (case.inputs[name] for name in ("q", "k", "v", "log_gate"))
    case.sizes(q, "batch heads length key_dim")
    case.states(value_dim=v.shape[-1], initial_state="initial_state" in case.inputs)
    given = {"scale": q.shape[-1] ** -0.5, "initial_state": case.inputs.get("initial_state")}
    for form in ("step", "chunked", "parallel"):
        out, state = ops.recurrence(q, k, v, log_decay=g, form=form, **given)
        yield case.compare("out.o", out)
        yield case.compare("out.final_state", state)
