"""How the published adaptive filter's weights map to ours."""

from __future__ import annotations

from collections.abc import Iterator

from einops import rearrange

import attlas
from attlas.contract.cases import Case, Check, adapter, load_weights

RENAMED = {"omega": "lambda_imag_v", "mu": "mu_v", "sigma": "sigma_v", "eta": "eta_v",
           "gamma": "gamma_v", "nu": "nu_sqrt", "tau": "tau"}  # fmt: skip


@adapter("adaptive-filter", mechanism="adaptive-filter-attention")
def adaptive_filter(case: Case) -> Iterator[Check]:
    config, heads, numbers = case.config, case.config["heads"], case.config["complex_head_dim"]
    # The step of time is one, whatever its length.
    case.states(residual=("none", None, False, "add values", "add", True))
    case.without_effect("config.delta_t")
    if config.get("complex_input_norm") == 2:
        case.without_effect("param.cn_v.gamma")  # made, and not used
    layer = attlas.make(
        "adaptive-filter-attention", dim=config["d_e"], heads=heads, head_dim=2 * numbers,
        length=config["length"], robust=config["robust"], additive=config["additive_bias"],
        multiplicative=config["multiplicative_bias"], causal=config.get("causal", True), bias=True,
        input_norm={0: "none", 1: "qkv", 2: "qk"}[config.get("complex_input_norm", 0)],
        output_norm=bool(config.get("complex_output_norm", 0)),
        residual=config.get("residual") not in ("none", None, False),
        turn_back=bool(config.get("rotate_values", True)),
        predict=bool(config.get("next_step_prediction", False)),
    )  # fmt: skip
    weights = {ours: case.params[theirs].flatten() for ours, theirs in RENAMED.items()}
    weights["omega"] = weights["omega"].view(heads, -1)
    for name in "qkvo":
        for kind in ("weight", "bias"):
            theirs = case.params[f"W_{name}.{kind}"]
            if name != "o":  # all real parts, then all imaginary ones; ours go head by head
                theirs = rearrange(theirs, "(two h d) ... -> (h two d) ...", two=2, h=heads)
            elif kind == "weight":
                theirs = rearrange(theirs, "x (two h d) -> x (h two d)", two=2, h=heads)
            weights[f"{name}_proj.{kind}"] = theirs
    for name in layer.gains:
        weights[f"gains.{name}"] = case.params[f"cn_{name}.gamma"].reshape(heads, numbers)
    load_weights(layer, weights)
    x = case.inputs["x"]
    yield case.compare("out.y", layer(x))
    if "weights" in case.mids:
        far = (layer.prepare(x)[-1].positions[:, None] - layer.prepare(x)[-1].positions).abs()
        decay = (layer.decay(x.dtype)[:, None, None] * far).clamp(min=-10.0).exp()
        yield case.compare("mid.weights", rearrange(layer.weights(x) / decay, "b h q k -> b q k h"))
    if "latent_estimate" in case.mids and not layer.residual:
        prepared = layer.prepare(x)
        latent = layer.attend(*prepared)
        if layer.turn_back:
            latent = layer.rotated(latent, prepared[-1].positions)
        latent = rearrange(latent, "b h t (two d) -> b t h d two", two=2)
        yield case.compare("mid.latent_estimate", latent)
