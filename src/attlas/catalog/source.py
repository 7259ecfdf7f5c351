"""What is registered, read off the sources without importing them.

    @mechanism("differential-transformer", paper=..., aliases=(...))
    class Differential(Attention): ...

`attlas list` knows every object in half a second, and `attlas.make` imports the one file that it
needs. The decorator's name, paper and aliases are therefore written as plain strings; what only the
object itself can tell (its options, its special case) is asked of the object when it is imported.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from attlas.catalog import kinds
from attlas.catalog.kinds import KINDS, TASK, Kind
from attlas.catalog.stages import changed, is_paper

#: The kinds by the names under which sources import them.
_KINDS = {name: kind for name, kind in vars(kinds).items() if isinstance(kind, Kind)}


@dataclass(frozen=True)
class Declared:
    """One decorated class or function of a room.

    Attributes:
        name: under which it is registered.
        paper: slug of its catalogue row; empty for building blocks that no row names.
        aliases: other names.
        former: names that it once had, which are taken with a warning.
        kind: that its class's nearest base carries, or its decorator names.
        module: that defines it.
        qualname: its name there.
        doc: the docstring that tells of it: its module's, or its own when the module has none.
        stages: the stages of attention that it changes, see `attlas.catalog.stages`.
    """

    name: str
    paper: str
    aliases: tuple[str, ...]
    former: tuple[str, ...]
    kind: Kind
    module: str
    qualname: str
    doc: str
    stages: tuple[str, ...]


@cache
def declared() -> tuple[Declared, ...]:
    """All that the package's rooms register, by module."""
    rooms = [room for kind in KINDS for room in kind.rooms]
    modules = dict.fromkeys(module for room in rooms for module in _modules(room))
    return tuple(found for module in modules for found in _declared_in(module))


def _declared_in(module: str) -> Iterator[Declared]:
    tree = _tree(module)
    doc = ast.get_docstring(tree) or ""
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef):
            continue
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and _called(call) in ("mechanism", "task"):
                yield _read(node, call, module, doc)


def _read(node: ast.ClassDef | ast.FunctionDef, call: ast.Call, module: str, doc: str) -> Declared:
    given = {k.arg: k.value for k in call.keywords}
    line = list(_line(node, module)) if isinstance(node, ast.ClassDef) else []
    kind = _kind(line, given)
    try:
        if kind is None:
            raise ValueError("of no kind")
        name = ast.literal_eval(call.args[0])
        unless_given = "" if kind is TASK else name
        paper = ast.literal_eval(given["paper"]) if "paper" in given else unless_given
        aliases, former = (
            tuple(ast.literal_eval(given[names])) if names in given else ()
            for names in ("aliases", "former")
        )
    except (ValueError, IndexError) as error:
        raise ValueError(
            f"{module}, line {call.lineno}: what is registered derives from the base of a kind or names "
            f"its kind, and has its name, paper and aliases as plain strings ({error})"
        ) from error
    own = ast.get_docstring(node) or ""
    told = doc or own if line else own
    stages = _stages(line, kind)
    return Declared(name, paper, aliases, former, kind, module, node.name, told, stages)


def _kind(line: list[tuple[ast.ClassDef, str]], given: dict[str | None, ast.expr]) -> Kind | None:
    """The kind that the nearest class carries, or that the decorator was given."""
    found = given.get("kind")
    for each, _ in line:
        carried = [
            i.value for i in each.body
            if isinstance(i, ast.AnnAssign | ast.Assign) and "kind" in _targets(i)
        ]  # fmt: skip
        if carried:
            found = carried[0]
            break
    named = found.id if isinstance(found, ast.Name) else getattr(found, "attr", "")
    return _KINDS.get(named)


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


# Stages ----------------------------------------------------------------------------------------------


def _stages(line: list[tuple[ast.ClassDef, str]], kind: Kind) -> tuple[str, ...]:
    defined: set[str] = set()
    told: list[str] = []
    bases = {  # of kinds: what they define is no paper's change
        base.name for each, module in line if "kind" in _members(each)[0]
        for base, _ in _line(each, module)
    }  # fmt: skip
    for each, module in line:
        names, stages = _members(each)
        told += stages
        if each.name not in bases and is_paper(module):
            defined |= names
    return changed(kind, told, defined)


def _line(node: ast.ClassDef, module: str) -> Iterator[tuple[ast.ClassDef, str]]:
    """A class and all its bases in the package, nearest first, with their modules."""
    queue = [(node, module)]
    while queue:
        each, home = queue.pop(0)
        yield each, home
        queue += [found for base in each.bases if (found := _resolved(base, home)) is not None]


def _members(node: ast.ClassDef) -> tuple[set[str], tuple[str, ...]]:
    """(names that a class body defines, the stages that it says it changes)."""
    names: set[str] = set()
    stages: tuple[str, ...] = ()
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            names.add(item.name)
        if not _is_option(item):  # which leaves the class body, see `attlas.options`
            names |= _targets(item)
        if "changes" in _targets(item) and isinstance(item, ast.Assign | ast.AnnAssign):
            stages = tuple(ast.literal_eval(item.value)) if item.value else ()
    return names, stages


def _is_option(item: ast.stmt) -> bool:
    """Whether a statement declares an option."""
    value = getattr(item, "value", None)
    return isinstance(value, ast.Call) and _called(value) == "option"


def _targets(item: ast.stmt) -> set[str]:
    """Names that a statement assigns to."""
    targets = item.targets if isinstance(item, ast.Assign) else [getattr(item, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _resolved(base: ast.expr, module: str) -> tuple[ast.ClassDef, str] | None:
    """The class that a base's name means in a module, and its home; None outside the package."""
    if isinstance(base, ast.Attribute):  # attlas.Attention
        whole = isinstance(base.value, ast.Name) and base.value.id == "attlas"
        return _resolved(ast.Name(base.attr), "attlas") if whole else None
    if not isinstance(base, ast.Name):
        return None
    for item in ast.walk(_tree(module)):
        if isinstance(item, ast.ClassDef) and item.name == base.id:
            return item, module
        if isinstance(item, ast.ImportFrom) and (item.module or "").startswith("attlas"):
            for alias in item.names:
                if (alias.asname or alias.name) == base.id:
                    return _resolved(ast.Name(alias.name), str(item.module))
    return None


# Files -----------------------------------------------------------------------------------------------

#: `@mechanism(` or `@attlas.mechanism(`, at the margin.
_DECORATED = re.compile(r"^@(\w+\.)*(mechanism|task)\(", re.MULTILINE)


def path_of(module: str) -> Path | None:
    """The source file of one of the package's modules; None where there is none."""
    stem = Path(__file__).parents[1].joinpath(*module.split(".")[1:])
    return next((p for p in (stem.with_suffix(".py"), stem / "__init__.py") if p.is_file()), None)


def _modules(room: str) -> Iterator[str]:
    """Modules of a room that register something, in the order of their names."""
    path = path_of(room)
    if path is None:
        return
    files = sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]
    for file in files:
        text = file.read_text(encoding="utf-8")
        if _DECORATED.search(text):
            inner = file.relative_to(path.parent).with_suffix("").parts if file != path else ()
            yield ".".join((room, *inner))


@cache
def _tree(module: str) -> ast.Module:
    path = path_of(module)
    assert path is not None, module
    return ast.parse(path.read_text(encoding="utf-8"))
