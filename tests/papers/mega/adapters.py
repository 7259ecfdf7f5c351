"""Mega: time first there, α and δ under each other's names, and every average with an axis more."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

import attlas
from attlas.bases.damped_ema import DampedEMA
from attlas.contract.cases import Case, Check, adapter, load_weights

AVERAGE = {"alpha": "delta", "delta": "alpha", "beta": "beta", "eta": "gamma", "omega": "omega"}


def average(params: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Our names and shapes for the published ones."""
    found = {ours: params[prefix + theirs] for ours, theirs in AVERAGE.items()}
    return {name: x.squeeze(-1) if x.ndim == 3 else x for name, x in found.items()}


@adapter("mega-ema", mechanism="mega")
def mega_ema(case: Case) -> Iterator[Check]:
    config, x = case.config, case.inputs["x"].transpose(0, 1)
    case.sizes(x, "batch length dim")
    ema = DampedEMA(config["dim"], config["ndim"], both_ways=config["bidirectional"])
    load_weights(ema, average(case.params))
    for form in ("fft",) if ema.both_ways else ("fft", "step"):
        yield case.compare("out.y", ema(x, form=form)[0].transpose(0, 1))


@adapter("mega", "mega-relu2", mechanism="mega")
def mega(case: Case) -> Iterator[Check]:
    config, params, chunk = case.config, case.params, case.config["chunk"]
    case.sizes(case.inputs["x"], "L B dim")
    if chunk >= 0:
        case.without_effect("config.maxpos")  # distances reach as far as a chunk
    name = "mega" if chunk < 0 else "mega-chunk"
    longest = {"max_positions": config["maxpos"]} if chunk < 0 else {"chunk": chunk}
    layer = attlas.make(
        name, dim=config["dim"], head_dim=config["zdim"], values=config["hdim"], ema=config["ndim"],
        weights_by=config["attn"], relative=config["rpb"], causal=not config["bi"],
        prenorm=config["prenorm"], **longest,
    )  # fmt: skip
    linears = {"v_proj": "v_proj", "mixed_proj": "mx_proj", "o_proj": "h_proj"}
    weights = {
        f"{ours}.{part}": params[f"{theirs}.{part}"]
        for ours, theirs in linears.items() for part in ("weight", "bias")
    }  # fmt: skip
    weights |= {f"average.{name}": x for name, x in average(params, "move.").items()}
    weights |= {"gain": params["gamma"], "shift": params["beta"]}
    if config["rpb"] == "simple":
        weights["distance"] = params["rel_pos_bias.rel_pos_bias"]
    else:
        weights["distance"] = torch.cat([params[f"rel_pos_bias.{p}"] for p in ("alpha", "beta")])
    norm = {part: params[f"norm.norm.{part}"] for part in ("weight", "bias")}
    if config["prenorm"]:
        weights |= {f"norm.{part}": x for part, x in norm.items()}
    load_weights(layer, weights)
    x = case.inputs["x"].transpose(0, 1)
    y = layer(x)
    if not config["prenorm"]:
        y = layer_norm(y, y.shape[-1:], norm["weight"], norm["bias"])
    yield case.compare("out.y", y.transpose(0, 1))
    if "attn" in case.mids:
        size = x.shape[1] if chunk < 0 else chunk
        blocks = layer.weights(x)[:, 0].unflatten(-1, (-1, size)).unflatten(1, (-1, size))
        yield case.compare("mid.attn", blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1))
