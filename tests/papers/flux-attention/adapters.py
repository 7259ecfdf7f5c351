"""The adapter of flux attention's router to published numbers."""

from __future__ import annotations

from collections.abc import Iterator

from attlas.cache.flux_routers import Router
from attlas.contract.cases import Case, Check, adapter, load_weights


@adapter("flux-router", mechanism="flux-attention")
def flux_router(case: Case) -> Iterator[Check]:
    """Logits and probabilities; noise is drawn and not used in the authors' evaluation."""
    x, config = case.inputs["x"], case.config
    case.sizes(x, "B heads T d_feature")
    case.states(use_softmax=True)
    router = Router(x.shape[3])
    ours = {"cls_feat_extractor": "features", "cls_router_head_agnostic": "head"}
    load_weights(router, {
        f"{ours[name.partition('.')[0]]}.{name.partition('.')[2]}": weight
        for name, weight in case.params.items()
    })  # fmt: skip
    logits = router(x, config["pool_size"])
    yield case.compare("out.logits", logits)
    yield case.compare("out.probs", logits.softmax(-1))
