"""Transformers is touched in one place, on public names, in a known range of versions."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import transformers

from attlas import hf
from attlas.errors import UserError

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "attlas"
#: Files of Transformers that define what attlas builds on; their private names are looked for.
THEIRS = (
    "cache_utils", "configuration_utils", "generation/utils", "initialization", "masking_utils",
    "modeling_layers", "modeling_rope_utils", "modeling_utils", "utils/generic",
)  # fmt: skip


def sources() -> dict[str, ast.Module]:
    return {
        path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text())
        for path in SOURCE.rglob("*.py")
    }


def words(tree: ast.AST) -> set[str]:
    """Names of attributes and of class variables, and strings."""
    found = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    found |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    found |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return {word for word in found if re.fullmatch(r"_[a-z]\w*", word)}


def defined(tree: ast.AST) -> set[str]:
    return {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


def test_one_package_imports_transformers() -> None:
    for path, tree in sources().items():
        if path.startswith("hf/"):
            continue
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] != "transformers", f"{path}:{node.lineno}"


def test_private_names_are_those_of_the_docs() -> None:
    folder = Path(transformers.__file__).parent
    trees = [ast.parse((folder / f"{file}.py").read_text()) for file in THEIRS]
    theirs = set().union(*(words(tree) | defined(tree) for tree in trees))
    used = {
        (name, path)
        for path, tree in sources().items()
        for name in words(tree) & theirs - defined(tree)
        if not hasattr(torch, name)
    }
    page = (ROOT / "docs" / "transformers.md").read_text()
    rows = re.findall(r"^\| `(_\w+)` \| ([^|]*) \| [^|]+ \|$", page, re.M)
    assert used == {(name, path) for name, files in rows for path in re.findall(r"`(.*?)`", files)}


def test_ranges_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for package, versions in hf.RANGES.items():
        low, high = (".".join(map(str, version)) for version in versions)
        assert f"{package}>={low},<{high}" in project["dependencies"]


@pytest.mark.parametrize(
    ("package", "found"),
    [("transformers", "5.16.3"), ("transformers", "5.25.0.dev0"), ("transformers", "6.0.0"),
     ("torch", "2.10.0+cpu"), ("torch", "2.16.0a0+git")],
)  # fmt: skip
def test_versions_out_of_range_name_the_remedy(package: str, found: str) -> None:
    with pytest.raises(UserError, match=rf"{re.escape(found)}; pip install '{package}>="):
        hf.check_version(package, found)
    assert not hf.check_version("transformers", "5.24.3")
    assert not hf.check_version("torch", "2.15.1+cu130")


def test_constraints_are_the_ends_of_the_ranges() -> None:
    newest, oldest = (
        dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / f"constraints{which}.txt").read_text(), re.M))
        for which in ("", "-oldest")
    )
    for package, (first, end) in hf.RANGES.items():
        assert oldest[package] == ".".join(map(str, first)) + ".0"
        assert first < tuple(map(int, newest[package].split(".")[:2])) < end


def test_importing_attlas_imports_no_transformers() -> None:
    code = "import sys, attlas; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
