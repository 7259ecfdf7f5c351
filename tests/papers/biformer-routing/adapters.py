"""The adapter of bi-level routing attention to published numbers."""

from __future__ import annotations

from collections.abc import Iterator

from attlas.contract.cases import Case, Check, adapter, load_weights
from attlas.modules.biformer import BiLevelRouting


@adapter("biformer-bra", mechanism="biformer-routing")
def biformer_bra(case: Case) -> Iterator[Check]:
    """Which regions are read, their weights and the output; channels stand last in the published map."""
    config, x = case.config, case.inputs["x"]
    case.sizes(x, "B H W dim")
    case.states(kv_downsample="identity")
    module = BiLevelRouting(
        x.shape[-1], heads=config["heads"], regions=config["n_win"], topk=config["topk"],
        qk_dim=config["qk_dim"], kernel_size=config["side_dwconv"] or None,
        soft_routing=config["soft_routing"],
    )  # fmt: skip
    weights, parts = {}, (module.qk_dim, module.qk_dim, module.channels)
    for name in ("weight", "bias"):
        split = case.params[f"qkv.qkv.{name}"].split(parts)
        weights |= {f"{p}_proj.{name}": w for p, w in zip("qkv", split, strict=True)}
        weights[f"o_proj.{name}"] = case.params[f"wo.{name}"]
        if module.local is not None:
            weights[f"local.{name}"] = case.params[f"lepe.{name}"]
    load_weights(module, weights)
    q, k = (module.split(p(x)) for p in (module.q_proj, module.k_proj))
    shares, chosen = module.route(q, k, module.inside(*x.shape[1:3], x.device))
    if "routing_indices" in case.mids:
        yield case.compare("mid.routing_indices", chosen)
    if "routing_weights" in case.mids:
        yield case.compare("mid.routing_weights", shares)
    yield case.compare("out.o", module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
