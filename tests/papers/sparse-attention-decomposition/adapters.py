"""Adapter of the sparse decomposition of attention scores to published vectors of one head."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attlas.analyses.sparse_attention_decomposition import decompose, signal
from attlas.contract.cases import Case, Check, adapter


@adapter("sparse-attention-decomposition", mechanism="sparse-attention-decomposition")
def one_head(case: Case) -> Iterator[Check]:
    """Terms, their selection, and projections."""
    config, x = case.config, case.inputs["X"]
    case.sizes(x, "T d_model")
    case.without_effect("config.seed")  # of weights and states, which are given
    q, k = (torch.cat([case.params[f"W_{n}"][0], case.params[f"b_{n}"]]).double() for n in "QK")
    case.states(d_head=q.shape[1])
    x = x.double()
    parts = decompose(q, k)
    products = parts.terms(x[:, None], x[None])
    yield case.compare("out.singular_values", parts.sigma)
    yield case.compare("out.products", products)
    yield case.compare("out.scores", products.sum(-1))
    chosen = signal(products, config["contribution_threshold"])
    yield case.compare("out.selected", chosen.to(torch.uint8))
    named = torch.zeros(len(parts.sigma), dtype=torch.bool)
    named[config["projection_singular_vectors"]] = True
    first, second = config["projection_positions"]
    yield case.compare("out.projected_U", parts.projected(x[first], "query", named, keep=True))
    yield case.compare("out.projected_V_perp", parts.projected(x[second], "key", named, keep=False))
