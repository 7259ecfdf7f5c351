"""Pyramid sparse attention: the authors' levels and their kernel with levels given."""

from __future__ import annotations

from collections.abc import Iterator

from attlas.contract.cases import Case, Check, adapter
from attlas.ops.pyramid_sparse_attention import largest_pool, pyramid_sparse_attention, ranked


@adapter("psa-mask", mechanism="pyramid-sparse-attention")
def psa_mask(case: Case) -> Iterator[Check]:
    config, importance, k = case.config, case.inputs["block_importance"], case.inputs["k"]
    case.sizes(importance, "B heads query_blocks key_blocks")
    ends = {int(level): config["mask_ratios"][level][1] for level in config["mask_ratios"]}
    least = config.get("min_full_attn_ratio", 0.06)
    for by, name in (("quota", "level_topk"), ("threshold", "level_threshold")):
        if name in case.outs:
            yield case.compare(f"out.{name}", ranked(importance, ends, by, least=least))
    cap = largest_pool(k, config["key_block"], tuple(config["thresholds"]))
    yield case.compare("out.similarity_cap", cap)


@adapter("psa-attention", mechanism="pyramid-sparse-attention")
def psa_attention(case: Case) -> Iterator[Check]:
    config, (q, k, v) = case.config, (case.inputs[name] for name in "qkv")
    case.sizes(q, "B heads T head_dim")
    case.without_effect("config.tile")  # keys of an inner loop
    out, _ = pyramid_sparse_attention(
        q, k, v, levels=case.inputs["level"].long(), q_block=config["BLOCK_M"],
        k_block=config["key_block"],
    )  # fmt: skip
    yield case.compare("out.o", out)
