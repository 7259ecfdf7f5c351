"""Combiner: cases give queries that are scaled already."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attlas
from attlas.contract.cases import Case, Check, adapter


def _checked(case: Case, **options: Any) -> Iterator[Check]:
    q, k, v = (case.inputs[name] for name in ("q_scaled", "k", "v"))
    case.sizes(q, "B heads T head_dim")
    size = case.config["segment"]
    case.states(segments=q.shape[2] // size, dtype=str(q.dtype).removeprefix("torch."))
    layer = attlas.make(
        "combiner", dim=q.shape[1] * q.shape[3], heads=q.shape[1], head_dim=q.shape[3], segment=size,
        **options,
    ).to(q.dtype).eval()  # fmt: skip
    *_, inputs = layer.prepare(q.new_zeros(len(q), q.shape[2], layer.dim))
    inputs.carried["queries"] = q / layer.scale
    yield case.compare("out.o", layer.attend(q / layer.scale, k, v, inputs))
    weights = layer.weigh(q / layer.scale, k, inputs)
    yield case.compare("out.o", weights @ v)
    if "span_key" in case.mids:
        shown = q.new_ones(1, 1, q.shape[2] // size, size).bool()
        rows = (x.unflatten(2, (-1, size)) for x in (q, k, v))
        for name, ours in zip(("key", "value"), layer._summaries(*rows, shown), strict=True):
            yield case.compare(f"mid.span_{name}", ours)


@adapter("combiner-fixed", mechanism="combiner")
def combiner_fixed(case: Case) -> Iterator[Check]:
    activation, pooling = case.config["local_summary"].split("-")
    causal = case.config["causal"]
    yield from _checked(
        case, activation=activation, pooling=pooling, causal=causal, own_region=not causal
    )


@adapter("combiner-axial-mixture", mechanism="combiner")
def combiner_axial_mixture(case: Case) -> Iterator[Check]:
    yield from _checked(case, regions="axial", causal=True)
