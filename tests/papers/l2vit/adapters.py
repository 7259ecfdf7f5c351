"""L²ViT: the linear attention and the concentration module, each by itself on the same input."""

from __future__ import annotations

from collections.abc import Iterator

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights
from attlas.layers.linear.l2vit import Concentration


@adapter("l2vit", mechanism="l2vit")
def l2vit(case: Case) -> Iterator[Check]:
    config, x = case.config, case.inputs["x"]
    grid = (config["h"], config["w"])
    attention, module = {}, {}
    case.sizes(x, "B _ dim")
    case.states(bias="attn.qkv.bias" in case.params)
    case.without_effect("config.xs")  # by which the inputs given were scaled
    for name, weight in case.params.items():
        part, _, rest = name.partition(".")
        if part == "lcm":
            module[rest.replace("bn.", "norm.")] = weight
        elif rest.startswith("qkv."):
            for letter, each in zip("qkv", weight.chunk(3), strict=True):
                attention[f"{letter}_proj.{rest.removeprefix('qkv.')}"] = each
        else:
            attention[rest.replace("proj.", "o_proj.")] = weight
    layer = attlas.make("l2vit", dim=config["dim"], heads=config["heads"], grid=grid, kernel_size=None)
    load_weights(layer, attention)
    yield case.compare("out.attention", layer(x))
    if "denominator_before_clamp" in case.mids:
        q, k, *_ = layer.prepare(x)
        yield case.compare("mid.denominator_before_clamp", layer.total(q.relu(), k.relu()))
    concentration = Concentration(config["dim"], config["ks"])
    load_weights(concentration, module)
    yield case.compare("out.lcm", concentration(x, grid))
