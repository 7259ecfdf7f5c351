"""What a page shows, read from its own data."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import torch

from attlas.errors import UserError
from attlas.parts.record.pyramid import Pyramid
from attlas.view.look.contents import (
    Circuit,
    Compare,
    Edge,
    Flow,
    Grid,
    Joint,
    Neuron,
    Node,
    Table,
)
from attlas.view.look.pack import Unpacker

_DATA = re.compile(r'<script type="application/json" id="data">([^<]*)</script>')


def contents_of(html: str) -> dict[str, Any]:
    """The fields of `Contents` that a page was made of.

    Raises:
        ValueError: the text is no such page.
    """
    found = _DATA.search(html)
    if found is None:
        raise UserError("this is no page of `attlas inspect`: it holds no data")
    data, blobs = json.loads(found[1]), Unpacker(html)
    flow, circuit, compare = data["flow"], data["circuit"], data["compare"]
    return {
        "model": data["model"],
        "tokens": data["tokens"],
        "keys": data["keys"],
        "scores": _scores(data["scores"], blobs),
        "patterns": {tuple(x["at"]): _pattern(x, blobs) for x in data["patterns"]},
        "neurons": {tuple(x["at"]): _neuron(x, blobs) for x in data["neurons"]},
        "joint": {tuple(x["at"]): _joint(x, blobs) for x in data["joint"]},
        "flow": flow and Flow(
            blobs.index(flow["index"]), blobs.floats(flow["share"]), flow["meaning"]
        ),
        "circuit": circuit and Circuit(
            [Node(*node) for node in circuit["nodes"]], [Edge(*edge) for edge in circuit["edges"]],
            circuit["meaning"],
        ),
        "tables": [Table(**table) for table in data["tables"]],
        "says": data["says"],
        "compare": compare and Compare(compare["model"], _scores(compare["scores"], blobs)),
    }  # fmt: skip


def _scores(scores: Sequence[dict[str, Any]], blobs: Unpacker) -> dict[str, Grid]:
    return {x["name"]: Grid(blobs.floats(x["values"]), x["meaning"]) for x in scores}


def _pattern(x: dict[str, Any], blobs: Unpacker) -> Pyramid:
    if x["whole"] is not None:
        return Pyramid.of(blobs.floats(x["whole"]))
    level = x["levels"][0]
    grids = {}
    for name in ("mass", "maxima"):
        grids[name] = torch.zeros(level["rows"], level["columns"])
        for tile in level["tiles"]:
            block = blobs.floats(tile[name])
            rows = slice(tile["row"], tile["row"] + block.shape[0])
            grids[name][rows, tile["column"] : tile["column"] + block.shape[1]] = block
    strips = x["strips"]
    return Pyramid(
        x["queries"], x["keys"], x["cell"], **grids,
        index=torch.cat([blobs.index(s["index"]) for s in strips]),
        weight=torch.cat([blobs.floats(s["weight"]) for s in strips]),
        rest=torch.cat([blobs.floats(s["rest"]) for s in strips]),
    )  # fmt: skip


def _neuron(x: dict[str, Any], blobs: Unpacker) -> Neuron:
    q, k, weights = (blobs.floats(x[name]) for name in ("q", "k", "weights"))
    return Neuron(q, k, weights, x["first"], x["scaling"], x["causal"])


def _joint(x: dict[str, Any], blobs: Unpacker) -> Joint:
    norm = None if x["norm"] is None else blobs.floats(x["norm"])
    return Joint(
        blobs.floats(x["points"]), blobs.index(x["query"]).bool(), blobs.index(x["position"]),
        x["token"], norm,
    )  # fmt: skip
