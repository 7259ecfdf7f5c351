"""How DeepSeek-V3's latent attention maps to ours."""

from __future__ import annotations

from collections.abc import Iterator

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights
from attlas.positions import RoPE

NAMES = {
    "q_a_proj": "q_down.0", "q_a_layernorm": "q_down.1", "q_b_proj": "q_proj",
    "kv_a_proj_with_mqa": "kv_down", "kv_a_layernorm": "kv_norm", "kv_b_proj": "kv_up",
}  # fmt: skip


@adapter("mla", mechanism="multi-head-latent-attention")
def latent(case: Case) -> Iterator[Check]:
    config = case.config
    layer = attlas.make(
        "mla", dim=config["dim"], heads=config["heads"], head_dim=config["qk_nope_head_dim"],
        latent=config["kv_lora_rank"], rotary=config["qk_rope_head_dim"],
        query_latent=config.get("q_lora_rank"), value_dim=config["v_head_dim"],
        causal=config.get("causal", True), bias=True,
    )  # fmt: skip
    layer.rope = RoPE(
        config["qk_rope_head_dim"], config.get("rope_theta", 1e4),
        interleaved=config.get("rope_interleave", True),
    )  # fmt: skip
    layer.scale = config.get("scaling", layer.scale)
    layer.kv_norm.eps = config.get("rms_eps", 1e-6)
    if config.get("q_lora_rank"):
        layer.q_down[1].eps = config.get("rms_eps", 1e-6)
    weights = {}
    for name, weight in case.params.items():
        first, _, rest = name.partition(".")
        weights[f"{NAMES.get(first, first)}.{rest}"] = weight
    load_weights(layer, weights)
    x = case.inputs["x"]
    yield case.compare("out.y", layer(x))
    if "kv_down" in case.mids:
        yield case.compare("mid.kv_down", layer.kv_down(x))
    if "weights" in case.mids:
        yield case.compare("mid.weights", layer.weights(x))
