"""The routing transformer: a third party's attention on given q, k and v."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights


@adapter("routing-transformer", mechanism="routing-transformer")
def kmeans_attention(case: Case) -> Iterator[Check]:
    config, params = case.config, case.params
    q, k, v = (case.inputs[name] for name in "qkv")
    case.sizes(q, "B heads T head_dim")
    # Tokens that hold their query, key and value side by side.
    x = torch.cat([side.transpose(1, 2).flatten(2) for side in (q, k, v)], dim=-1)
    means = params["kmeans.means"]
    memories = params["mem_key"].shape[2] if "mem_key" in params else 0
    shared = config.get("shared_qk", True)
    # The program has one at least where a query might meet nobody else.
    least = 1 if config["causal"] and not shared else 0
    case.states(num_mem_kv=tuple({memories, 0 if memories == least else memories}))
    case.states(num_clusters=means.shape[1])
    layer = attlas.make(
        "routing-transformer", dim=x.shape[-1], heads=q.shape[1], head_dim=q.shape[-1], local_heads=0,
        clusters=means.shape[1], window=config["window_size"], causal=config["causal"], shared=shared,
        memories=memories, commitment=config.get("commitment", 1e-4),
        decay=config.get("ema_decay", 0.999),
    )  # fmt: skip
    parts = torch.eye(x.shape[-1]).chunk(3)
    own = {f"{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)}
    if shared:
        del own["k_proj.weight"]
    learnt = {name: params[name] for name in ("mem_key", "mem_value") if name in params}
    learnt = learnt if memories else {}
    load_weights(layer, {**own, **learnt, "means": means, "o_proj.weight": layer.o_proj.weight})
    *prepared, inputs = layer.prepare(x)
    yield case.compare("out.o", layer.attend(*prepared, inputs))
    if "aux_loss" in case.outs:
        layer.train().prepare(x)
        theirs = case.outs["aux_loss"]
        yield case.compare("out.aux_loss", layer.auxiliary_loss.reshape(theirs.shape))
