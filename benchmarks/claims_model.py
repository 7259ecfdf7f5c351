"""Claims that a language model must show, on SmolLM2: NAME.json of those that are named, or of all.

    python benchmarks/claims_model.py [--out FOLDER] [--lines FOLDER] [--at-once 6] [--quick] [NAME ...]

A claim is measured in cells, a seed and what is measured, each a process of its own and `--at-once` of
them side by side. Every row is a line of `--lines`/NAME-CELL-SEED.jsonl as soon as there is one; a cell
that is finished is not measured again. When all are, the record goes to `--out`, beside the others with
`--out benchmarks/claims`. `--quick` tries the program with hardly any steps and texts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

from attlas.kinds.expect import Expectation, Row, verdict
from attlas.study.record import packed, save
from claims_conversion import CONVERSIONS
from claims_heads import HEADS

CLAIMS = {**HEADS, **CONVERSIONS}
#: The last line of a cell that is finished.
END = "end"


def lines_of(folder: Path, name: str, cell: str, seed: int) -> Path:
    return folder / f"{name}-{cell}-{seed}.jsonl"


def found_in(path: Path) -> list[Row] | None:
    """The rows of a cell; None while it is not finished."""
    told = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if not told or told[-1] != END:
        return None
    return [Row(**line) for line in told[:-1]]


def measure(name: str, cell: str, seed: int, quick: bool, path: Path) -> None:
    """One cell, from its beginning."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    with path.open("w", encoding="utf-8") as file:
        for row in CLAIMS[name].rows(cell, seed, quick):
            file.write(json.dumps(row._asdict()) + "\n")
            file.flush()
            spent = time.perf_counter() - start
            print(
                f"{name} {cell} seed {seed} {spent:5.0f} s  {row.name}: {row.value:.4g} {row.unit}",
                flush=True,
            )
        file.write(json.dumps(END) + "\n")


def run(waiting: list[list[str]], at_once: int) -> None:
    """Processes, so many side by side."""
    running: list[subprocess.Popen[bytes]] = []
    while waiting or running:
        running = [each for each in running if each.poll() is None]
        while waiting and len(running) < at_once:
            running.append(subprocess.Popen([sys.executable, __file__, *waiting.pop(0)]))
        time.sleep(0.2)


def recorded(name: str, cells: list[tuple[str, int]], folder: Path, out: Path) -> None:
    """The record of a claim all of whose cells are finished."""
    claim, rows = CLAIMS[name], []
    for cell, seed in cells:
        found = found_in(lines_of(folder, name, cell, seed))
        if found is None:
            print(f"{name}: {cell} of seed {seed} is not finished")
            return
        rows += found
    rows += claim.derived(rows)
    numbers = defaultdict(list)
    for row in rows:
        numbers[row.name].append(row.value)
    cuda = torch.cuda.is_available()
    made = packed(
        name, claim.says, claim.set_up, f"python benchmarks/claims_model.py {name}", numbers,
        verdict([one.answer(rows) for one in claimed(name)[1]]),
        {row.name: (row.unit, row.better) for row in rows},
        machine=torch.cuda.get_device_name() if cuda else None,
    )  # fmt: skip
    save(made, out / f"{name}.json")
    print(f"{name}: {made['verdict']}")
    for number in made["numbers"]:
        print(f"  {number['of']}: {number['mean']:.4g} ± {number['spread']:.2g}")


def claimed(name: str) -> tuple[str, tuple[Expectation, ...]]:
    """What is claimed of a mechanism, and when it holds."""
    return CLAIMS[name].says, CLAIMS[name].expects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CLAIMS)}")
    parser.add_argument("--out", type=Path, default=Path("attlas-claims"))
    parser.add_argument("--lines", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=6)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cell", help="measure this one alone, here")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in CLAIMS]:
        parser.error(f"no claim is called {unknown[0]!r}; there are {', '.join(CLAIMS)}")
    lines = given.lines or given.out / "lines"
    lines.mkdir(parents=True, exist_ok=True)
    if given.cell:
        (name,) = given.names
        path = lines_of(lines, name, given.cell, given.seed)
        measure(name, given.cell, given.seed, given.quick, path)
        return
    names = given.names or list(CLAIMS)
    cells = {
        name: [(cell, seed) for seed in range(given.seeds) for cell in CLAIMS[name].cells]
        for name in names
    }
    waiting = [
        [
            name,
            "--cell",
            cell,
            "--seed",
            str(seed),
            "--lines",
            str(lines),
            *["--quick"] * given.quick,
        ]
        for name, each in cells.items()
        for cell, seed in each
        if found_in(lines_of(lines, name, cell, seed)) is None
    ]
    run(waiting, given.at_once)
    for name, each in cells.items():
        recorded(name, each, lines, given.out)


if __name__ == "__main__":
    main()
