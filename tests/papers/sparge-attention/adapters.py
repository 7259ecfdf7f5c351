"""SpargeAttention: the authors' map of blocks, and exact attention on it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attlas import masks
from attlas.contract.cases import Case, Check, adapter
from attlas.ops.block_reference import as_lists
from attlas.ops.block_sparse import block_sparse
from attlas.ops.sparge_attention import block_map, means


@adapter("sparge-block-map", mechanism="sparge-attention")
def sparge_block_map(case: Case) -> Iterator[Check]:
    config, (q, k, v) = case.config, (case.inputs[name] for name in "qkv")
    case.sizes(q, "B heads T head_dim")
    size, mask = (config["BLKQ"], config["BLKK"]), masks.causal if config["causal"] else None
    options: Any = {
        "mass": config.get("cdfthreshd"), "share": config.get("topk"),
        "similar": config["simthreshd1"], "sink": config.get("attention_sink", False),
    }  # fmt: skip
    mean, cosine = means(k, size[1])
    if "k_pool" in case.mids:
        yield case.compare("mid.k_pool", mean)
    if "k_block_similar" in case.mids:
        yield case.compare("mid.k_block_similar", cosine > options["similar"])
    chosen = block_map(
        q, k, mask=mask, scale=q.shape[-1] ** -0.5, q_offset=0, q_block=size[0], k_block=size[1],
        **options,
    )  # fmt: skip
    yield case.compare("out.block_map", chosen)
    if "o_exact_on_map" in case.outs:
        out = block_sparse(q, k, v, as_lists(chosen), size=size, mask=mask, q_offset=0)
        yield case.compare("out.o_exact_on_map", out)
