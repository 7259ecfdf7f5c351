"""The adapter of efficient local attention to published numbers."""

from __future__ import annotations

from collections.abc import Iterator

from attlas.contract.cases import Case, Check, adapter, load_weights
from attlas.modules.ela import ELA


@adapter("ela", mechanism="ela-efficient-local")
def ela(case: Case) -> Iterator[Check]:
    """Both strips' weights and the output, for any kernel and groups."""
    config, x = case.config, case.inputs["x"]
    told = [config[name] for name in ("B", "channels", "H", "W")]
    if list(x.shape) != told:
        raise ValueError(f"in.x is {list(x.shape)}, the config tells {told}")
    module = ELA(
        config["channels"], kernel=config["kernel_size"], groups=config["conv_groups"],
        norm_groups=config["norm_groups"],
    )  # fmt: skip
    names = {"conv.weight": "conv.weight", "gn.weight": "norm.weight", "gn.bias": "norm.bias"}
    load_weights(module, {names[name]: weight for name, weight in case.params.items()})
    rows, columns = module.strips(x)
    found = {"mid.a_h": rows, "mid.a_w": columns, "out.y": module(x)}
    for name in [f"mid.{n}" for n in case.mids] + [f"out.{n}" for n in case.outs]:
        yield case.compare(name, found[name])
