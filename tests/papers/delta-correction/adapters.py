"""How the published correction of sparse attention maps to ours."""

from __future__ import annotations

from collections.abc import Iterator

from attlas import ops
from attlas.contract.cases import Case, Check, adapter
from attlas.parts.select.delta_correction import DeltaCorrection
from attlas.parts.select.sparse_prefill import SparsePrefill
from reference.policies import prompt_call


@adapter("delta-attention", mechanism="delta-correction")
def delta_attention(case: Case) -> Iterator[Check]:
    """The sparse output, and the corrected one by the op and by the part."""
    config = case.config
    q, k, v, sparse = (case.inputs[n] for n in ("q", "k", "v", "sparse_o"))
    case.sizes(q, "B heads T head_dim")
    gamma, tail = config["gamma_lambda"], config.get("tail", 128)
    scale, sinks = q.shape[-1] ** -0.5, config.get("sink", 0)
    call = prompt_call(q, k, v, scale)
    if "sliding_window" in config:
        ours = SparsePrefill(sinks=sinks, recent=config["sliding_window"]).attend(
            call
        )
        assert ours is not None
        yield case.compare("in.sparse_o", ours.transpose(1, 2))
    yield case.compare("out.o", ops.delta_correction(q, k, v, sparse, gamma=gamma, tail=tail))
    part = DeltaCorrection(gamma=gamma, tail=tail).output(call, sparse.transpose(1, 2))
    yield case.compare("out.o", part.transpose(1, 2))._replace(name="out.o, by the part")
