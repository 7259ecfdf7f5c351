"""The adapter of halo attention to published numbers."""

from __future__ import annotations

from collections.abc import Iterator

from attlas.contract.cases import Case, Check, adapter, load_weights
from attlas.modules.halonet import HaloAttention


@adapter("halonet", "halonet-masked", mechanism="halonet")
def halonet(case: Case) -> Iterator[Check]:
    """The output, for any blocks, halo and heads; padding takes part but in the masked cases.

    The published tables count a query's place within its block and a key's within the window, so that
    their first 2 · halo vectors are never read; ours begin behind them.
    """
    config, x = case.config, case.inputs["x"]
    case.sizes(x, "B dim height width")
    module = HaloAttention(
        x.shape[1], heads=config["heads"], head_dim=config["dim_head"], block_size=config["block_size"],
        halo_size=config["halo_size"], mask_padding=case.name == "halonet-masked",
    )  # fmt: skip
    weights, unread = case.params, 2 * config["halo_size"]
    k, v = weights["to_kv.weight"].chunk(2)
    load_weights(module, {
        "q_proj.weight": weights["to_q.weight"], "k_proj.weight": k, "v_proj.weight": v,
        "o_proj.weight": weights["to_out.weight"], "o_proj.bias": weights["to_out.bias"],
        "rel_height": weights["rel_pos_emb.rel_height"][unread:],
        "rel_width": weights["rel_pos_emb.rel_width"][unread:],
    })  # fmt: skip
    yield case.compare("out.o", module(x))
