"""The page: its data packed, its own styles and programs, in one file."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from typing import Any

from jaxtyping import Float
from torch import Tensor

from attlas.parts.record.pyramid import Pyramid, coarser
from attlas.view.look.contents import Contents, Grid, HeadOf, Joint, Neuron
from attlas.view.look.pack import Packer, Reference, in_script

#: Cells a side of a tile, and queries of a strip of strongest keys: what is unpacked at once.
TILE, STRIP = 256, 1024
#: The page's programs, in the order in which they stand.
PROGRAMS = (
    "data", "state", "paint", "heads", "panel", "pattern", "moves", "text", "lines", "neuron", "joint",
    "flow", "circuit", "tables", "main",
)  # fmt: skip


def page(contents: Contents, start: str = "") -> str:
    """The page of what was found; `start` as in its links ("head=3.4&score=induction")."""
    packer = Packer()
    data = {**_data(contents, packer), "start": start}
    own, shared = files("attlas.view").joinpath("look", "web"), files("attlas.view").joinpath("page")
    programs = [own.joinpath(f"{name}.js").read_text("utf-8") for name in PROGRAMS]
    programs.insert(-1, shared.joinpath("sort.js").read_text("utf-8"))
    filled = {
        "title": escape(visible(contents.model)),
        "css": shared.joinpath("page.css").read_text("utf-8") + own.joinpath("look.css").read_text("utf-8"),
        "data": in_script(data),
        "blobs": packer.elements(),
        "js": "\n".join(programs),
    }
    # Each place is filled once, in order, so that a brace in a user's text is never a place.
    text, html = own.joinpath("look.html").read_text("utf-8"), ""
    for name in ("title", "css", "title", "data", "blobs", "js"):
        before, _, text = text.partition("{" + name + "}")
        html += before + filled[name]
    return html + text


def visible(text: str) -> str:
    """Text with what cannot be seen written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _data(contents: Contents, packer: Packer) -> dict[str, Any]:
    layers, heads = contents.shape
    flow, circuit, compare = contents.flow, contents.circuit, contents.compare
    return {
        "model": contents.model,
        "tokens": list(contents.tokens),
        "keys": None if contents.keys is None else list(contents.keys),
        "layers": layers,
        "heads": heads,
        "scores": _scores(contents.scores, packer),
        "patterns": [_pattern(at, x, packer) for at, x in contents.patterns.items()],
        "neurons": [_neuron(at, x, packer) for at, x in contents.neurons.items()],
        "joint": [_joint(at, x, packer) for at, x in contents.joint.items()],
        "flow": None if flow is None else {
            "index": packer.put(flow.index, "index"), "share": packer.put(flow.share, "share"),
            "meaning": flow.meaning,
        },
        "circuit": None if circuit is None else {
            "nodes": [[n.kind, n.layer, n.head, float(n.weight)] for n in circuit.nodes],
            "edges": [[e.start, e.end, float(e.weight)] for e in circuit.edges],
            "meaning": circuit.meaning,
        },
        "tables": [
            {"title": t.title, "columns": list(t.columns), "rows": [list(row) for row in t.rows]}
            for t in contents.tables
        ],
        "says": list(contents.says),
        "compare": None if compare is None else {
            "model": compare.model, "scores": _scores(compare.scores, packer),
        },
    }  # fmt: skip


def _scores(scores: Any, packer: Packer) -> list[dict[str, Any]]:
    grids: list[tuple[str, Grid]] = list(scores.items())
    return [
        {"name": name, "meaning": grid.meaning, "values": packer.put(grid.values, "float")}
        for name, grid in grids
    ]


def _pattern(at: HeadOf, pattern: Pyramid, packer: Packer) -> dict[str, Any]:
    found: dict[str, Any] = {
        "at": list(at), "queries": pattern.queries, "keys": pattern.keys, "cell": pattern.cell,
        "levels": [], "whole": None, "strips": [],
    }  # fmt: skip
    if pattern.whole is not None:  # all else follows from it
        return found | {"whole": packer.put(pattern.whole, "share")}
    assert pattern.index is not None
    assert pattern.weight is not None
    assert pattern.rest is not None
    cell, mass, maxima = pattern.cell, pattern.mass, pattern.maxima
    while True:
        found["levels"].append(
            {"cell": cell, "rows": mass.shape[0], "columns": mass.shape[1],
             "tiles": _tiles(mass, maxima, packer)}
        )  # fmt: skip
        if max(mass.shape) <= TILE:
            break
        for _ in range(2):  # each level has cells of four times the side of those below it
            mass, maxima = coarser(mass, maxima, cell, pattern.queries)
            cell *= 2
    for first in range(0, pattern.queries, STRIP):
        rows = slice(first, first + STRIP)
        found["strips"].append(
            {"first": first, "index": packer.put(pattern.index[rows], "index"),
             "weight": packer.put(pattern.weight[rows], "share"),
             "rest": packer.put(pattern.rest[rows], "share")}
        )  # fmt: skip
    return found


def _tiles(
    mass: Float[Tensor, "rows columns"], maxima: Float[Tensor, "rows columns"], packer: Packer
) -> list[dict[str, Any]]:
    """Tiles of one level, but for those that are empty."""
    found = []
    for row in range(0, mass.shape[0], TILE):
        for column in range(0, mass.shape[1], TILE):
            there = slice(row, row + TILE), slice(column, column + TILE)
            if maxima[there].any():
                put: dict[str, Reference] = {
                    "mass": packer.put(mass[there], "share"),
                    "maxima": packer.put(maxima[there], "share"),
                }
                found.append({"row": row, "column": column, **put})
    return found


def _neuron(at: HeadOf, neuron: Neuron, packer: Packer) -> dict[str, Any]:
    return {
        "at": list(at), "first": neuron.first, "scaling": float(neuron.scaling),
        "causal": neuron.causal, "q": packer.put(neuron.q, "float"),
        "k": packer.put(neuron.k, "float"), "weights": packer.put(neuron.weights, "share"),
    }  # fmt: skip


def _joint(at: HeadOf, joint: Joint, packer: Packer) -> dict[str, Any]:
    return {
        "at": list(at), "points": packer.put(joint.points, "float"),
        "query": packer.put(joint.is_query.int(), "index"),
        "position": packer.put(joint.position, "index"), "token": list(joint.token),
        "norm": None if joint.norm is None else packer.put(joint.norm, "float"),
    }  # fmt: skip
