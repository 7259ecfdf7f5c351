"""How published Q-Filters map to ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from attlas.cache.policy import best_slots
from attlas.calibration import Calibration
from attlas.contract.cases import Case, Check, adapter
from attlas.parts.evict.q_filters import QFilters
from attlas.storage.files import fingerprint
from attlas.storage.layer import LayerState, StoredLayer
from reference.model import on_model, smollm2
from reference.policies import prompt_call


@adapter("q-filters", mechanism="q-filters")
def q_filters(case: Case) -> Iterator[Check]:
    """Filters of given queries, then scores and kept keys; the window is kept besides."""
    config, keys = case.config, case.inputs["k"]
    window, budget = config["window_length"], config["max_length"]
    case.sizes(keys, "_ kv_heads T head_dim")
    case.sizes(case.inputs["queries"], "_ query_samples head_dim")
    case.states(groups=len(case.inputs["queries"]) // keys.shape[1])
    policy = QFilters(tokens=budget, recent=window)
    calibrator = policy.calibrator()
    queries = case.inputs["queries"][None]
    empty = torch.zeros(1, config["kv_heads"], queries.shape[2], queries.shape[3])
    calibrator.observe(prompt_call(queries, empty, empty, queries.shape[-1] ** -0.5))
    filters = calibrator.tensors()
    yield case.compare("out.filters", filters["0.filter"])
    policy.found = Calibration("q-filters", {}, filters)
    state = LayerState(0, (0,))
    layer = StoredLayer({policy.name: state})
    layer.update(keys, keys)
    slots = policy.slots(layer, state, layer.rows())
    scores = policy.scores(state, slots)
    yield case.compare("out.scores", scores[..., : keys.shape[2] - window])
    kept, _ = best_slots(scores, slots.valid, slots.budget)
    yield case.compare("out.kept_prefix_indices", kept[..., : budget - window])


@adapter("model-qfilter", mechanism="q-filters")
def q_filters_on_model(case: Case) -> Iterator[Check]:
    """The given filters on the real language model."""
    case.without_effect("config.filters_from")  # they are given
    filters = {f"{i}.filter": f for i, f in enumerate(case.params["q_filters"])}
    known = Calibration("q-filters", fingerprint(smollm2()), filters)

    def make(config: dict[str, Any]) -> QFilters:
        return QFilters(1.0 - config["compression_ratio"], recent=0, calibration=known)

    return on_model(case, make)
