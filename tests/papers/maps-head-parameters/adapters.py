"""Adapter of MAPS to published numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attlas.analyses.maps_head_parameters import Reading, salient, scored
from attlas.contract.cases import Case, Check, adapter
from attlas.inspect.readout import readout
from reference.model import smollm2_of


@adapter("maps-smollm2", mechanism="maps-head-parameters")
def maps(case: Case) -> Iterator[Check]:
    """Relations in all heads of the real model, with and without its first MLP, and one head's tokens."""
    model, config = smollm2_of(case), case.config
    numbers = sorted(name.removeprefix("src") for name in case.inputs if name.startswith("src"))
    pairs = [torch.stack([case.inputs[f"{end}{n}"] for end in ("src", "dst")], dim=1) for n in numbers]
    case.states(**{f"pairs{n}": len(each) for n, each in zip(numbers, pairs, strict=True)})
    case.states(kv_head="query head h uses value head h//3")
    case.without_effect(*(f"config.relation{n}" for n in numbers))  # the names of those pairs
    out, joined = readout(model), torch.cat(pairs)
    both = [Reading(model, out, mlp) for mlp in (True, False)]
    found = []
    with torch.no_grad():
        for layer in range(model.config.num_hidden_layers):
            x = torch.cat([reading.sources(layer, joined[:, 0]) for reading in both])
            found.append(scored(both[0], layer, x, joined[:, 1].repeat(2)))
    among = (torch.stack(found) < config["k"]).float().unflatten(-1, (2, -1))
    for name, each in zip(("mlp", "plain"), among.unbind(-2), strict=True):
        for n, one in zip(numbers, each.split([len(p) for p in pairs], dim=-1), strict=True):
            shares = one.mean(dim=-1)
            yield case.compare(f"out.relation{n}_{name}", shares[:, 0])
            yield case.compare(f"out.suppression{n}_{name}", shares[:, 1])
    with torch.no_grad():
        best = salient(both[0], *config["salient_head"], config["salient_tokens"], config["mappings"])
    yield case.compare("out.salient_tokens", best.tokens)
    yield case.compare("out.salient_amplification", best.amplification)
    yield case.compare("out.salient_mappings", best.mappings)
