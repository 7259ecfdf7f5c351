"""The shape of the package: who imports whom, how long files are, what import costs."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from statistics import median

import pytest

from attlas.catalog import registry
from attlas.catalog.kinds import MASK, OP

SOURCE = Path(__file__).parents[1] / "src"
#: Lines of the longest file, of the file that every reader opens first, and of half of the mechanisms'.
LONGEST, FIRST, MEDIAN = 350, 260, 130
#: Rooms of mechanisms, one paper a file.
ROOMS = ("layers", "parts", "modules", "adapt")
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
    assert not {name for name, lines in lengths.items() if lines > LONGEST}
    assert lengths["attlas/attention.py"] <= FIRST


def test_half_of_the_mechanisms_fit_a_screen_or_two() -> None:
    files = [
        path for room in ROOMS for path in (SOURCE / "attlas" / room).rglob("*.py")
        if "@mechanism(" in path.read_text(encoding="utf-8")
    ]  # fmt: skip
    assert median(len(p.read_text(encoding="utf-8").splitlines()) for p in files) <= MEDIAN


def test_options_are_declared_and_not_passed_on() -> None:
    for path in (SOURCE / "attlas").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "**options: Any" not in text, path
        if "attlas.options" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ClassDef):
                continue
            # To a type checker a name with a type and no value is an option that must be given.
            bare = [s for s in node.body if isinstance(s, ast.AnnAssign) and s.value is None]
            dataclass = any("dataclass" in ast.unparse(d) for d in node.decorator_list)
            bases = {ast.unparse(base) for base in node.bases}
            kept = dataclass or {"NamedTuple", "TypedDict", "Protocol"} & bases
            assert kept or all("ClassVar" in ast.unparse(s) for s in bare), f"{path}: {node.name}"
            constructor = next((n for n in node.body if getattr(n, "name", "") == "__init__"), None)
            if constructor is not None:
                assert not _attributes_before_the_base(constructor), f"{path}: {node.name}"


def _attributes_before_the_base(constructor: ast.FunctionDef) -> bool:
    """Whether a constructor that calls its base's sets attributes before it does."""
    lines = [ast.unparse(statement) for statement in constructor.body]
    base = next((n for n, line in enumerate(lines) if "super().__init__(" in line), 0)
    return any(re.match(r"(\(?self\.\w+)", line) for line in lines[:base])


@pytest.mark.parametrize("name", [e.name for e in registry.entries() if e.kind not in (OP, MASK)])
def test_few_classes_stand_between_a_paper_and_its_kind(name: str) -> None:
    obj = registry.find(name).object
    if not inspect.isclass(obj):
        return
    carrier = next(c for c in obj.__mro__ if "kind" in vars(c))
    assert longest_line(obj, carrier) <= 3, [c.__name__ for c in obj.__mro__]


def longest_line(cls: type, base: type) -> int:
    """Steps from a class to a base of it, by the longest way."""
    ways = [longest_line(b, base) + 1 for b in cls.__bases__ if issubclass(b, base)]
    return max(ways, default=0)


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


def test_every_benchmark_still_finds_what_it_imports() -> None:
    folder = SOURCE.parent / "benchmarks"
    needs = {"beside_kvpress": "kvpress"}  # not among what the tests install
    names = [p.stem for p in sorted(folder.glob("*.py")) if p.stem not in needs]
    program = "\n".join(
        f"try: import {name}\nexcept Exception as error: print('{name}:', error)" for name in names
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True
    )
    assert run.stdout == ""
