"""One decoded token over caches of every kind, beside SDPA's fastest decode and a plain copy.

32 query heads, 8 key heads, width 128, bfloat16: a Llama's layer. Every candidate is a CUDA graph, the
main ones are timed without one too; all take turns. Small caches are rotated, so that none is read from
a level-2 cache. What is read counts as bytes, what SDPA reads of the full cache over time as ratio, and
the roof is what a copy reaches, reading and writing. `--tune` tries the kernels' tiles instead.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import common
from attlas.bench.steps import SHARE, Step, pages
from attlas.ops.decode import decode
from attlas.ops.pages import (
    best_pages,
    page_bounds,
    page_scores,
    reference_best_pages,
    reference_page_scores,
)
from attlas.ops.segments import Coded, Dense, Listed, Ragged
from common import save, show
from decode_cells import (
    DEVICE,
    HEADS,
    KV_HEADS,
    WIDTH,
    Cell,
    coded,
    dense,
    ragged,
    random,
    tokens,
)

#: What makes a step of a cache's keys and values.
Make = Callable[[Tensor, Tensor], Step]


def candidates(quick: bool, only: list[str] | None = None) -> dict[str, Make]:
    """All ways to hold a cache, by name, or those alone that are named."""
    sizes, widths = ((32,), (4, 2)) if quick else ((16, 32, 64), (8, 4, 3, 2))
    found: dict[str, Make] = {
        "dense": dense, "ragged at 1/2": ragged, f"tokens at 1/{SHARE}": tokens,
    }  # fmt: skip
    found |= {f"pages of {n}": partial(pages, page=n) for n in sizes}
    found |= {f"coded {bits}": partial(coded, bits=bits) for bits in widths}
    tokenwise = {f"coded {n} per token": partial(coded, bits=n, per_channel=False) for n in widths}
    found |= tokenwise
    return found if only is None else {name: found[name] for name in only}


def checked(make: Make) -> dict[str, object]:
    """The kernels' largest error against float64, and what is allowed: twice the plain form's."""
    q, k, v = random(2, HEADS, 1, WIDTH), *(random(2, KV_HEADS, 2048, WIDTH) for _ in "kv")
    segments = make(k, v).segments(q)
    found = decode(q, segments, route="triton")[0].double()
    plain = decode(q, segments, route="reference")[0].double()
    exact = decode(q.double(), [wide(s) for s in segments], route="reference")[0]
    ours, theirs = ((x - exact).abs().max().item() for x in (found, plain))
    return {"max_error": ours, "allowed": 2 * theirs, "as_exact": ours <= 2 * theirs}


def wide(segment: Any) -> Any:
    """The segment, whose numbers are read in float64."""
    if isinstance(segment, Coded):
        k, v = (replace(codes, dtype=torch.float64) for codes in (segment.k, segment.v))
        return replace(segment, k=k, v=v)
    return replace(segment, k=segment.k.double(), v=segment.v.double())


def checked_pages(page: int) -> dict[str, object]:
    """Whether scores and choice of pages are those of their references."""
    q, k = random(2, HEADS, 1, WIDTH), random(2, KV_HEADS, 8192, WIDTH)
    low, high = page_bounds(k, page)
    scores = page_scores(q, low, high)
    right = reference_page_scores(q, low, high, shared=True)
    count = 8192 // page // SHARE
    error = ((scores - right).abs().max() / right.abs().max()).item()
    same = torch.equal(best_pages(scores, count), reference_best_pages(scores, count))
    return {"max_error": error, "as_exact": error < 1e-4 and same}


def cells(quick: bool) -> Iterator[tuple[int, int]]:
    yield from [(1, 8192), (8, 131072)] if quick else product((1, 8), (8192, 32768, 131072))


def checks(quick: bool, only: list[str] | None) -> list[dict[str, object]]:
    """Every candidate against float64, before anything is timed."""
    rows = []
    for name, check in [
        *((name, partial(checked, make)) for name, make in candidates(quick, only).items()),
        *((f"scores and choice of pages of {n}", partial(checked_pages, n)) for n in (16, 32, 64)),
    ]:
        try:
            rows.append(show({"check": name, **check()}))
        except Exception as error:
            message = f"{type(error).__name__}: {str(error)[:300]}"
            rows.append(show({"check": name, "error": message}))
    return rows


def measure(options: argparse.Namespace) -> None:
    quick, rounds, only = options.quick, options.rounds, options.candidates
    rows = checks(quick, only)
    for batch, keys in options.cells or cells(quick):
        cell = Cell(batch, keys)
        cell.add_baselines()
        for name, make in candidates(quick, only).items():
            cell.add_step(name, make)
        for page in (16, 32) if only is None else (16, 32, 64):
            if only is None or f"pages of {page}" in only:
                cell.add_parts(page)
        rows += cell.failed + cell.timed(rounds)
        save(options.name, DEVICE, rows)  # after each, so that a fault later loses nothing
        del cell
        gc.collect()
        torch.cuda.empty_cache()


def tried() -> list[tuple[str, dict[Any, Any], Any, Any, Make, list[tuple[int, ...]]]]:
    """(name, table of tiles, its key, their class, candidate, tiles to try)."""
    from attlas.kernels import coded as few_bits
    from attlas.kernels import decode as kernels

    of_dense: list[tuple[int, ...]] = [
        (64, 4, 4, 2), (64, 4, 3, 3), (64, 4, 3, 2), (128, 4, 3, 1), (128, 8, 3, 1), (32, 4, 5, 2),
        (32, 4, 6, 2), (128, 8, 2, 3), (64, 4, 4, 4), (64, 8, 4, 2), (64, 4, 6, 1),
    ]  # fmt: skip
    of_ragged: list[tuple[int, ...]] = [
        (64, 4, 4, 2), (64, 4, 4, 4), (64, 4, 4, 8), (64, 4, 4, 16), (64, 4, 3, 9), (128, 8, 3, 8),
        (32, 4, 6, 8),
    ]  # fmt: skip
    of_lists: list[tuple[int, ...]] = [
        (64, 4, 4, 4), (64, 4, 5, 3), (64, 4, 5, 6), (64, 4, 6, 2), (64, 4, 3, 5), (64, 4, 7, 2),
        (32, 4, 5, 6), (32, 4, 7, 4), (128, 8, 4, 2), (128, 8, 5, 1), (64, 8, 5, 3),
    ]  # fmt: skip
    of_codes: list[tuple[int, ...]] = [  # slots a warp, warps, stages, programs, registers
        (64, 2, 3, 5, 200), (64, 2, 3, 4, 255), (64, 2, 3, 6, 168), (64, 2, 3, 8, 128),
        (64, 2, 2, 6, 168), (64, 4, 3, 2, 255), (64, 4, 3, 3, 168), (64, 4, 2, 3, 168),
        (32, 2, 3, 5, 200), (32, 4, 3, 4, 128), (64, 1, 3, 9, 200),
    ]  # fmt: skip
    ours = kernels.TILES, kernels.Tiles
    found: list[tuple[str, Any, Any, Make, list[tuple[int, ...]]]] = [
        ("dense", ours, Dense, dense, of_dense),
        ("ragged", ours, Ragged, ragged, of_ragged),
        ("tokens", ours, Listed, tokens, of_lists),
        ("pages of 32", ours, Listed, partial(pages, page=32), of_lists),
    ]
    theirs = few_bits.TILES, few_bits.Tiles
    for bits in (8, 4, 2):
        for how, per_channel in (("", True), (" per token", False)):
            make = partial(coded, bits=bits, per_channel=per_channel)
            found.append((f"coded {bits}{how}", theirs, bits, make, of_codes))
    return [(name, *which, key, make, cuts) for name, which, key, make, cuts in found]


def tune(rounds: int, only: str) -> None:
    """Times of the kernels' tiles at 128k keys, fastest first."""
    for batch, (name, table, made, key, make, cuts) in product((8, 1), tried()):
        if only not in name:
            continue
        cell, usual = Cell(batch, 131072), table[key]
        for cut in cuts:
            table[key] = made(*cut)
            cell.add_step(f"{name} {cut}", make)
        table[key] = usual
        for tiles, time in sorted(cell.times(rounds).items(), key=lambda pair: pair[1]):
            rate = cell.nbytes[tiles] / time / 1e9
            show({"batch": batch, "tiles": tiles, "ms": time, "tb_per_s": rate})
        del cell
        gc.collect()
        torch.cuda.empty_cache()


def sizes(given: str) -> tuple[int, int]:
    """(batch, keys) of `batch:keys`."""
    batch, keys = given.split(":")
    return int(batch), int(keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two cells, and fewer candidates")
    parser.add_argument("--cells", nargs="+", type=sizes, help="batch:keys, in place of all")
    parser.add_argument("--candidates", nargs="+", help="these alone, as dense or 'pages of 64'")
    parser.add_argument("--name", default="decode", help="of the file of results")
    parser.add_argument("--tune", action="store_true", help="try tiles instead")
    parser.add_argument("--only", default="", help="part of the names whose tiles are tried")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder for results")
    options = parser.parse_args()
    common.RESULTS = options.out
    torch.manual_seed(0)
    with torch.inference_mode():
        if options.tune:
            tune(options.rounds, options.only)
        else:
            measure(options)


if __name__ == "__main__":
    main()
