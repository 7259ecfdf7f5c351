"""How ActQKV's published functions map to ours."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attlas.cache.probes import Running, page_cosines, probe
from attlas.contract.cases import Case, Check, adapter


@adapter("actqkv-probe-query", mechanism="actqkv-probe-query")
def actqkv(case: Case) -> Iterator[Check]:
    """Windows of queries one after the other: weights, probe queries and the scores of blocks."""
    windows, blocks = case.inputs["query_windows"], case.inputs["block_keys"]
    case.sizes(windows, "windows window hidden")
    case.sizes(blocks, "blocks hidden")
    running, found = Running.empty(windows[:1]), []
    for window in windows:
        everything = torch.ones(1, len(window), dtype=torch.bool)
        query, weights, running = probe(
            window[None], everything, running, case.config["history_cap"]
        )
        scores = page_cosines(query[:, None], blocks[None, None])
        found.append((weights[0], query[0], scores[0]))
    weights, queries, scores = (torch.stack(each) for each in zip(*found, strict=True))
    yield case.compare("out.token_weights", weights)
    yield case.compare("out.probe_queries", queries)
    yield case.compare("out.block_scores", scores)
    for name, ours in {"final_mean": running.mean, "final_var": running.var}.items():
        if name in case.mids:
            yield case.compare(f"mid.{name}", ours)
