"""The shape of the package: who imports whom, how long files are, what import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
#: Longest file; attention.py and its stages are to be shortened by what follows.
LONGEST, EXCEPTED = 350, {"attlas/attention.py"}
#: (who, what it never imports): the rooms stand on each other in one direction.
NEVER = (
    ("attlas.kernels", "attlas.attention"), ("attlas.ops", "attlas.layers"),
    ("attlas.ops", "attlas.attach"),
    ("attlas.masks", "attlas.attention"), ("attlas.attention", "attlas.layers"),
    ("attlas.layers", "attlas.parts"), ("attlas.layers", "attlas.attach"),
    ("attlas.layers", "attlas.models"), ("attlas.parts", "attlas.layers"),
    ("attlas.attach", "attlas.parts"), ("attlas.attach", "attlas.cache"),
    ("attlas.cache", "attlas.parts"), ("attlas.storage", "attlas.attach"),
    ("attlas.kinds", "attlas.adapt"),
    ("attlas.kinds", "attlas.studies"), ("attlas.kinds", "attlas.systems"),
)  # fmt: skip


@cache
def imports() -> dict[str, set[str]]:
    """Module -> the package's modules that it imports, wherever in the file and for types too."""
    files = {
        ".".join(p.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): p
        for p in SOURCE.rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        named: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= {name if name in files else node.module for name in inner}
            elif isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
        found[module] = {name for name in named if name in files} - {module}
    return found


def test_no_import_goes_in_a_circle() -> None:
    graph, open_, done = imports(), [], set()

    def visit(module: str) -> None:
        if module in open_:
            raise AssertionError(" -> ".join([*open_[open_.index(module) :], module]))
        if module in done:
            return
        open_.append(module)
        for other in sorted(graph[module]):
            visit(other)
        done.add(open_.pop())

    for module in sorted(graph):
        visit(module)


@pytest.mark.parametrize(("who", "what"), NEVER)
def test_rooms_stand_on_each_other_in_one_direction(who: str, what: str) -> None:
    wrong = {
        (module, other)
        for module, others in imports().items()
        for other in others
        if _in(module, who) and _in(other, what)
    }
    assert not wrong


def _in(module: str, room: str) -> bool:
    return module == room or module.startswith(f"{room}.")


def test_no_file_is_long() -> None:
    lengths = {
        path.relative_to(SOURCE).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in SOURCE.rglob("*.py")
    }
    assert {name for name, lines in lengths.items() if lines > LONGEST} <= EXCEPTED


def test_list_waits_for_neither_torch_nor_transformers() -> None:
    script = (
        "import sys; from attlas.catalog.command import list_papers\n"
        "list_papers(as_json=True)\n"
        "print({'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr.strip() == "set()"
    assert len(done.stdout.splitlines()) > 317
