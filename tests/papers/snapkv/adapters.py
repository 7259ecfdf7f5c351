"""How published SnapKV, TOVA, PyramidKV and Ada-KV map to ours."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from attlas.contract.cases import Case, Check, adapter
from attlas.parts.evict.ada_kv import AdaKV
from attlas.parts.evict.pyramid_kv import PyramidKV, pyramid
from attlas.parts.evict.snapkv import SnapKV
from attlas.parts.evict.tova import TOVA
from attlas.storage.layer import LayerState
from reference.model import on_model
from reference.policies import press, run_layer


def snapkv(config: dict[str, Any]) -> SnapKV:
    return SnapKV(
        1.0 - config["compression_ratio"],
        window=config["window_size"],
        kernel=config["kernel_size"],
        pooling="avg",
    )


def tova(config: dict[str, Any]) -> TOVA:
    return TOVA(1.0 - config["compression_ratio"])


class UnevenPyramid(PyramidKV):
    """Rounds each layer from a mean that may be no whole number, as published code does."""

    def budgets(self, state: LayerState, slots: Any) -> Tensor:
        place = state.layer, len(state.full)
        share = self.budget.keep or 0.0
        means = [(Fraction(valid * share), valid) for valid in slots.total.tolist()]
        return torch.tensor([pyramid(*m, self.floor[1], self.beta, *place) for m in means])


def pyramid_kv(config: dict[str, Any]) -> PyramidKV:
    options = {"window": config["window_size"], "kernel": config["kernel_size"], "pooling": "avg"}
    return UnevenPyramid(
        1.0 - config["compression_ratio"], scorer_options=options, beta=float(config["beta"])
    )


def ada_kv(config: dict[str, Any]) -> AdaKV:
    options = {"window": config["window_size"], "kernel": config["kernel_size"], "pooling": "avg"}
    return AdaKV(
        1.0 - config["compression_ratio"],
        scorer_options=options,
        alpha=float(config["alpha_safeguard"]),
    )


@adapter("press-snapkv", mechanism="snapkv")
def snapkv_layer(case: Case) -> Iterator[Check]:
    return press(case, snapkv(case.config))


@adapter("press-tova", mechanism="tova")
def tova_layer(case: Case) -> Iterator[Check]:
    return press(case, tova(case.config))


@adapter("model-snapkv", mechanism="snapkv")
def snapkv_on_model(case: Case) -> Iterator[Check]:
    return on_model(case, snapkv)


@adapter("model-tova", mechanism="tova")
def tova_on_model(case: Case) -> Iterator[Check]:
    return on_model(case, tova)


@adapter("model-pyramidkv", mechanism="pyramid-kv")
def pyramid_kv_on_model(case: Case) -> Iterator[Check]:
    return on_model(case, pyramid_kv)


@adapter("model-adakv-snapkv", mechanism="ada-kv")
def ada_kv_on_model(case: Case) -> Iterator[Check]:
    return on_model(case, ada_kv)


@adapter("snapkv", mechanism="snapkv")
def snapkv_cluster(case: Case) -> Iterator[Check]:
    """The prefix pairs in order of falling score, then the window; ours are in order of position."""
    config = case.config
    queries, keys, values = (case.inputs[name] for name in "qkv")
    case.sizes(queries, "B heads T head_dim")
    recent = config["window_size"]
    policy = SnapKV(
        tokens=config["max_capacity_prompt"],
        window=recent,
        kernel=config["kernel_size"],
        pooling=config["pooling"].removesuffix("pool"),
    )
    scores, kept = run_layer(policy, queries, keys, values)
    window = torch.arange(keys.shape[2] - recent, keys.shape[2]).expand(*kept.shape[:2], -1)
    prefix = kept[..., :-recent].long()
    prefix = prefix.gather(-1, scores.gather(-1, prefix).argsort(dim=-1, descending=True))
    if "kept_prefix_indices" in case.mids:
        theirs = case.mids["kept_prefix_indices"].long()
        # Pooling makes equal scores (max pooling many): of these either may be taken, in any order.
        ours_at, theirs_at = scores.gather(-1, prefix), scores.gather(-1, theirs)
        equal = (ours_at - theirs_at).abs() <= case.atol + case.rtol * theirs_at.abs()
        prefix = torch.where(equal, theirs, prefix)
        yield case.compare("mid.kept_prefix_indices", prefix)
    at = torch.cat([prefix, window], dim=-1)[..., None].expand(-1, -1, -1, keys.shape[-1])
    yield case.compare("out.k", keys.gather(2, at))
    yield case.compare("out.v", values.gather(2, at))
