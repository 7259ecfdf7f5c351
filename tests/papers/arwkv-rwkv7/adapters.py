"""RWKV-7: the bare recurrences, and ARWKV's time mixing."""

from __future__ import annotations

from collections.abc import Iterator

import attlas
from attlas import ops
from attlas.contract.cases import Case, Check, adapter, load_weights


@adapter("dplr-delta-rule", "gated-delta-rule", mechanism="arwkv-rwkv7")
def recurrences(case: Case) -> Iterator[Check]:
    q, k, v = (case.inputs[name] for name in "qkv")
    case.sizes(q, "batch heads length key_dim")
    case.states(value_dim=v.shape[-1], initial_state="initial_state" in case.inputs)
    if case.name == "dplr-delta-rule":
        # Theirs reads with α and writes with β.
        pair = (case.inputs["beta"], case.inputs["alpha"])
        given = {"log_decay": case.inputs["log_gate"], "low_rank": pair}
    else:
        given = {"log_decay": case.inputs["log_decay"], "beta": case.inputs["beta"]}
    given["initial_state"] = case.inputs.get("initial_state")
    for form in ("step", "chunked", "parallel"):
        out, state = ops.recurrence(q, k, v, **given, scale=q.shape[-1] ** -0.5, form=form)
        yield case.compare("out.o", out)
        yield case.compare("out.final_state", state)


@adapter("rwkv7-time-mix", mechanism="arwkv-rwkv7")
def time_mix(case: Case) -> Iterator[Check]:
    config, params = case.config, case.params
    behind = config["layer"] > 0
    case.sizes(case.inputs["x"], "B N C")
    gated = not config["gate_free"]
    eps = 1e-5 * config["head_size_divisor"] ** 2
    ranks = [params[f"{n}1"].shape[1] if f"{n}1" in params else 1 for n in "wavg"]
    layer = attlas.make(
        "arwkv-rwkv7", dim=config["C"], heads=config["C"] // config["hs"], head_dim=config["hs"],
        gate="arwkv" if gated else "none", norm=config["gn"], norm_eps=eps,
        value_residual=behind, ranks=tuple(ranks), layers=config["n_layer"], layer_idx=config["layer"],
    )  # fmt: skip
    names = {"q_proj": "receptance", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
    weights = {f"{ours}.weight": params[f"{theirs}.weight"] for ours, theirs in names.items()}
    weights |= {f"mix.{n}": params[f"x_{n}"].flatten() for n in ("rwkvag" if gated else "rwkva")}
    if not gated:
        case.without_effect("param.x_g")
    if not config["gn"]:
        case.without_effect("param.ln_x.weight", "param.ln_x.bias")
    maps = {"decay": "w", "step": "a"}
    maps |= {"toward_first": "v"} if behind else {}
    maps |= {"out_gate": "g"} if gated else {}
    for ours, theirs in maps.items():
        weights |= {f"{ours}.down": params[f"{theirs}1"], f"{ours}.up": params[f"{theirs}2"]}
        if f"{theirs}0" in params:
            weights[f"{ours}.bias"] = params[f"{theirs}0"].flatten()
    shape = (-1, 1, config["hs"])
    vectors = {"kappa": "k_k", "alpha": "k_a", "rho": "r_k"}
    vectors |= {"norm_weight": "ln_x.weight", "norm_bias": "ln_x.bias"} if config["gn"] else {}
    weights |= {ours: params[theirs].reshape(shape) for ours, theirs in vectors.items()}
    load_weights(layer, weights)
    x, extras = case.inputs["x"], {}
    if behind:
        extras["v_first"] = case.inputs["v_first"]
    q, k, v, inputs = layer.prepare(x, extras=extras)
    if "v_first" in case.outs and not behind:
        yield case.compare("out.v_first", v.transpose(1, 2).flatten(2))
    keys = layer.terms(q, k, inputs)
    out, state = ops.recurrence(keys[0], keys[1], v, **keys[2])
    for name, ours in (("wkv_out", out), ("state", state)):
        if name in case.mids:
            yield case.compare(f"mid.{name}", ours)
    yield case.compare("out.y", layer(x, **extras))
