"""Differential Mamba, whose heads take their group by turns; and the selective scan of Mamba-1."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu, softplus

import attlas
from attlas import ops
from attlas.contract.cases import Case, Check, adapter, load_weights


@adapter("mamba-selective-scan", mechanism="diff-mamba")
def selective_scan(case: Case) -> Iterator[Check]:
    given = case.inputs
    u, a = given["u"], given["A"]
    case.sizes(u, "batch dim length")
    case.sizes(a, "dim state")
    case.states(groups=None if given["B"].ndim == 3 else given["B"].shape[1])
    step = given["delta"]
    if "delta_bias" in given:
        step = step + given["delta_bias"][:, None]
    step = softplus(step) if case.config["delta_softplus"] else step

    def of_channels(x: Tensor) -> Tensor:
        """B or C of every channel [batch, channels, tokens, state]."""
        grouped = x[:, None] if x.ndim == 3 else x
        return grouped.mT.repeat_interleave(u.shape[1] // grouped.shape[1], dim=1)

    for form in ("step", "chunked"):
        # Every channel is a head with values one wide.
        y, state = ops.recurrence(
            of_channels(given["C"]), of_channels(given["B"]), (step * u)[..., None],
            log_decay=step[..., None] * a[:, None], form=form,
        )  # fmt: skip
        y = y[..., 0] + (given["D"][:, None] * u if "D" in given else 0.0)
        yield case.compare("out.y", y * silu(given["z"]) if "z" in given else y)
        if "last_state" in case.outs:
            yield case.compare("out.last_state", state[..., 0])


@adapter("differential-mamba", mechanism="diff-mamba")
def diff_mamba(case: Case) -> Iterator[Check]:
    config, params = case.config, case.params
    case.sizes(case.inputs["x"], "B N D")
    case.without_effect("config.chunk")  # of how it is computed
    heads, groups, shared = config["H"], config["G"], config["G"] * config["S"]
    width = config["expand_per_mixer"] * config["D"] // heads
    case.states(head_dim_per_mixer=width)
    layer = attlas.make(
        "diff-mamba", dim=config["D"], heads=heads, head_dim=width, state=config["S"],
        groups=groups, kernel_size=config["conv"], layer_idx=config["layer"], bias=config["bias"],
        step_limits=tuple(float(limit) for limit in config["time_step_limit"]),
        eps=config["eps_subln"],
    )  # fmt: skip
    # Theirs: head h of group h mod G; ours side by side.
    order = torch.arange(heads).view(-1, groups).mT.flatten()
    channels = torch.arange(heads * width).view(heads, width)[order].flatten()
    inner, names = heads * width, ("mixer_1", "mixer_2")

    def both(name: str, pick: Tensor) -> Tensor:
        return torch.cat([params[f"{mixer}.{name}"][pick] for mixer in names])

    mixed = torch.cat((channels, inner + torch.arange(2 * shared)))
    weights = {
        "conv.weight": both("conv1d.weight", mixed), "conv.bias": both("conv1d.bias", mixed),
        "rate": both("A_log", order), "skip": both("D", order), "step_bias": both("dt_bias", order),
        "lambda_q": params["lambda_q1"], "sub_norm.weight": params["subln.weight"],
    }  # fmt: skip
    for kind in ("weight", "bias") if config["bias"] else ("weight",):
        weights |= {
            f"gate_proj.{kind}": both(f"in_proj.{kind}", channels),
            f"in_proj.{kind}": both(f"in_proj.{kind}", inner + mixed),
            f"step_proj.{kind}": both(f"in_proj.{kind}", 2 * inner + 2 * shared + order),
        }
    for i, mixer in enumerate(names):
        weights[f"norms.{i}.weight"] = params[f"{mixer}.norm.weight"][channels]
        weights[f"o_proj.{i}.weight"] = params[f"{mixer}.out_proj.weight"][:, channels]
        if config["bias"]:
            weights[f"o_proj.{i}.bias"] = params[f"{mixer}.out_proj.bias"]
    load_weights(layer, weights)
    x = case.inputs["x"]
    normed = rms_norm(x, x.shape[-1:], params["norm.weight"], config["eps_norm"])
    yield case.compare("out.y", x + layer(normed))
