"""Probabilistic attention: the published layer begins at queries, keys and values of heads."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import attlas
from attlas.contract.cases import Case, Check, adapter
from attlas.inputs import Inputs


@adapter("probabilistic-attention", mechanism="probabilistic-attention")
def probabilistic(case: Case) -> Iterator[Check]:
    config, given = case.config, case.inputs
    q, zeta, mu = (given[name].mT for name in ("q", "zeta", "mu"))
    groups, width = q.shape[1], q.shape[3]
    case.sizes(q, "batch groups positions key_dim")
    case.states(value_dim=mu.shape[3])
    layer = attlas.make(
        "probabilistic-attention", dim=groups * width, heads=groups,
        # Priors that are given stand in for those of the magnitudes there; here they are multiplied.
        magnitude_priors=config.get("magnitude_priors", False) and "pi" not in given,
        key_steps=config.get("key_adaptation_iters", 0),
        value_steps=config.get("value_belief_propagation_iters", 0),
    )  # fmt: skip
    if not config.get("key_adaptation", True):
        layer.key_steps = 0
    layer.key_prior = _per_key(given.get("zeta_prior_precision"))
    layer.value_prior = _per_key(given.get("mu_prior_precision"))
    extras: dict[str, Tensor] = {}
    for name, kind in {"alpha": "query", "beta": "value"}.items():
        precision = given.get(name, config.get(name, 0.0))
        if config.get(f"uniform_{kind}_precision", False):
            setattr(layer, name, float(precision))
        precision = torch.as_tensor(precision, dtype=q.dtype)
        # A number, or [batch, groups, keys].
        precision = precision.view(*precision.shape, 1) if precision.ndim == 3 else precision
        extras[name] = precision.expand(*zeta.shape[:3], 1).squeeze(-1)
    if "v_init" in given:
        extras["initial"] = given["v_init"].mT
    if "v_fixed" in given:
        extras["fixed"] = given["v_fixed"].mT
    if "pi" in given:
        extras["log_prior"] = given["pi"].log()
    mask = given.get("mask")
    if mask is not None:
        mask = mask.bool().view(*(1,) * (4 - mask.ndim), *mask.shape)
    places = torch.arange(q.shape[2])
    x = torch.zeros(q.shape[0], q.shape[2], layer.dim)
    inputs = Inputs(x, None, places, places, extras=extras, pairs=mask, notes={"means": mu})
    yield case.compare("out.y", layer.attend(q, zeta, mu, inputs).mT)
    if "weights" in case.mids:
        yield case.compare("mid.weights", layer.weigh(q, zeta, inputs))


def _per_key(prior: Tensor | None) -> float | Tensor | None:
    """Published priors are [channels, positions] at the end, unless they are one number."""
    if prior is None:
        return None
    return float(prior) if prior.numel() == 1 else prior.mT
