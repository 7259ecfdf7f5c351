"""Fast weights: the bare recurrences, and the authors' layers, with q, k, v and β in one projection."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn.functional import layer_norm

import attlas
from attlas import ops
from attlas.contract.cases import Case, Check, adapter, load_weights


@adapter("delta-rule-fwp", "delta-rule", mechanism="fast-weight-delta-rule")
def recurrences(case: Case) -> Iterator[Check]:
    q, k, v, beta = (case.inputs[name] for name in ("q", "k", "v", "beta"))
    authors = case.name == "delta-rule-fwp"
    case.sizes(q, "batch heads length key_dim")
    case.states(value_dim=v.shape[-1], initial_state="initial_state" in case.inputs)
    given = {
        "scale": 1.0 if authors else q.shape[-1] ** -0.5,
        "initial_state": case.inputs.get("initial_state"),
    }
    for form in ("step", "chunked"):
        beta = beta.view(q.shape[:3])
        out, state = ops.recurrence(q, k, v, beta=beta, form=form, **given)
        yield case.compare("out.o", out)
        yield case.compare("out.final_state", state)
        if "o_sum_rule" in case.outs:
            out, _ = ops.recurrence(q, k, v, form=form, **given)
            yield case.compare("out.o_sum_rule", out)


@adapter("fwp-delta-dpfp", "fwp-delta-elu", mechanism="fast-weight-delta-rule")
def layer(case: Case) -> Iterator[Check]:
    config, params = case.config, case.params
    heads, width = config["H"], config["d_head"]
    feature = {"feature": "dpfp", "nu": config["n_roll"]} if "n_roll" in config else {"feature": "elu"}
    made = attlas.make(
        "fast-weight-delta-rule", dim=config["d_model"], heads=heads, head_dim=width, **feature,
        normalize=config["normalize_attn_scores"], eps=config["eps"],
        normalize_keys=case.name != "fwp-delta-dpfp",  # a layer that divides outputs alone
    )  # fmt: skip
    joined = params["qkvb_net.weight"].view(heads, 3 * width + 1, -1)
    parts = joined.split([width, width, width, 1], dim=1)
    names = ("q_proj", "k_proj", "v_proj", "beta_proj")
    weights = {f"{n}.weight": part.flatten(0, 1) for n, part in zip(names, parts, strict=True)}
    # Theirs scales what the heads give.
    weights["o_proj.weight"] = params["o_net.weight"] * width**-0.5
    load_weights(made, weights)
    case.sizes(case.inputs["x"], "L B d_model")
    case.states(dropout=(0, 0.0))
    x = case.inputs["x"].transpose(0, 1)
    norm = (x.shape[-1:], params["layer_norm.weight"], params["layer_norm.bias"], 1e-5)
    h = layer_norm(x, *norm) if config["pre_lnorm"] else x
    y = h + made(h)
    yield case.compare("out.y", (y if config["pre_lnorm"] else layer_norm(y, *norm)).transpose(0, 1))
