"""A paper is one file in src/ and one folder in tests/: where things lie, and a proof in a copy."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import attlas
from attlas.catalog import registry
from attlas.catalog.papers import papers
from attlas.contract import pins
from attlas.contract.cases import adapters, checkout_cases

TESTS = Path(__file__).parents[1]
PAPERS = TESTS / "papers"
ENTRIES = {e.name: e for e in registry.entries()}
SLUGS = {e.paper or e.name for e in ENTRIES.values()}
FOLDERS = sorted(folder.name for folder in PAPERS.iterdir() if folder.is_dir())

#: Shared tests that name modules of papers, and why they are no single paper's.
SHARED = {
    "attach/test_parts.py": "parts of several kinds in one session",
    "attach/test_refusals.py": "what attach refuses, by the example of some policies",
    "parts/gates/test_gate_claims.py": "q-filters and balancekv against each other",
    "parts/gates/test_gates.py": "what q-filters, balancekv and duo-attention have in common",
    "parts/quantize/test_mechanisms.py": "what quantisers share: coding, outliers, salience",
    "parts/select_heads/test_on_model.py": "selections against an eviction on the real model",
    "parts/select_heads/test_shared.py": "what selections by heads, layers and steps have in common",
    "parts/select_pages/test_page_selections.py": "what selections of pages have in common",
    "parts/test_head_roles.py": "head roles beside policies and layers of ours",
    "parts/test_patterns.py": "patterns beside a policy",
    "parts/test_policies.py": "what all cache policies have in common",
    "parts/test_recorders.py": "recorders beside a policy",
    "storage/test_storage.py": "what caches of policies are as files",
    "typing/options_in_an_editor.py": "options that are words, as an editor sees them",
}


def _slug(name: str) -> str:
    return ENTRIES[name].paper or name


def _imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, and `module.name` of what it imports from one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("slug", FOLDERS)
def test_a_papers_folder_holds_what_is_its_own(slug: str) -> None:
    folder = PAPERS / slug
    assert slug in SLUGS, "no registered object has this name or names this paper"
    own = {name for name in ENTRIES if _slug(name) == slug}
    assert set(json.loads((folder / "pins.json").read_text())) == own, "run `make pins`"
    for path in folder.iterdir():
        if path.name != "__pycache__":
            has_place = path.name in ("pins.json", "adapters.py", "golden")
            assert has_place or path.match("test_*.py"), (
                f"{path.name} has no place in a paper's folder"
            )
    known = {case for case, (run, _) in adapters().items() if run.__module__ == _module(slug)}
    cases = {path.name for path in folder.glob("golden/*")}
    assert cases <= known, "cases need an adapter in their folder's adapters.py"
    assert {_slug(adapters()[case][1]) for case in known} <= {slug}, "adapters of another paper"
    assert bool(known) == (folder / "adapters.py").exists()


def _module(slug: str) -> str:
    return f"attlas_adapters_{slug}"


def test_every_registered_object_has_its_folder() -> None:
    assert set(FOLDERS) == SLUGS


def test_cases_and_adapters_lie_nowhere_else() -> None:
    in_papers = {
        path.parent.relative_to(PAPERS).parts[1] for path in PAPERS.rglob("golden/*/*.json")
    }
    assert in_papers == {"golden"}
    labels = [case.label for case in checkout_cases()]
    assert len(labels) == len(set(labels)) == len(list(PAPERS.rglob("golden/*/*.json")))
    assert not [p for p in TESTS.rglob("*.safetensors") if PAPERS not in p.parents]
    for path in TESTS.rglob("*.py"):
        if path.name != "adapters.py" and path.parent != TESTS / "contract":
            assert "attlas.contract.cases.adapter" not in set(_imports(path)), path


def test_shared_tests_name_no_papers_module_without_a_reason() -> None:
    of_papers = {e.module for e in ENTRIES.values() if e.paper}
    found = {
        path.relative_to(TESTS).as_posix() for path in TESTS.rglob("*.py")
        if PAPERS not in path.parents and of_papers & set(_imports(path))
    }  # fmt: skip
    assert found == set(SHARED)


# The proof: in a copy of the checkout that has no other paper's tests --------------------------------

MASK = '''"""Every other key: a pattern of this test. Cost: half of all pairs. Source: this test."""

from attlas.catalog.kinds import MASK
from attlas.catalog.registry import mechanism
from attlas.masks.algebra import Mask
from attlas.masks.patterns import strided


@mechanism("toy-mask", paper="SLUG", kind=MASK, example={"stride": 2})
def toy(stride: int = 2) -> Mask:
    """Keys whose distance from the query is a multiple of `stride`.

    Raises:
        ValueError: a stride below 1.
    """
    return strided(stride)
'''
LAYER = '''"""Softmax attention under another name: a layer of this test. Source: this test."""

import attlas


@attlas.mechanism("toy-layer", paper="SLUG")
class Toy(attlas.Attention):
    """Softmax attention."""
'''
ADAPTERS = """import torch

import attlas
from attlas.contract.cases import adapter


@adapter("toy-case", mechanism="toy-layer")
def toy(case):
    torch.manual_seed(0)
    yield case.compare("out.y", attlas.make("toy-layer", dim=8, heads=2)(case.inputs["x"]))
"""


def _write_case(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "a.json").write_text('{"config": {}}')
    torch.manual_seed(0)
    layer, x = attlas.make("softmax", dim=8, heads=2), torch.randn(1, 5, 8)
    save_file({"in.x": x, "out.y": layer(x).detach()}, folder / "a.safetensors")


def test_adding_papers_touches_one_file_each_and_one_folder(tmp_path: Path) -> None:
    package = Path(attlas.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__", "data")
    shutil.copytree(package, tmp_path / "src" / "attlas", ignore=ignored)
    slug = papers(implemented=False)[0].slug
    folder = tmp_path / "tests" / "papers" / slug
    _write_case(folder / "golden" / "toy-case")
    (folder / "adapters.py").write_text(ADAPTERS)
    for path, text in (("masks/toy.py", MASK), ("layers/weights/toy.py", LAYER)):
        (tmp_path / "src" / "attlas" / path).write_text(text.replace("SLUG", slug))

    def run(*arguments: str) -> str:
        environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("attlas.contract.pins", "tests/papers")
    counts = json.loads((folder / "pins.json").read_text())
    assert counts["toy-mask"] == len(pins.pinned_checks("bigbird-mask"))
    assert counts["toy-layer"] == len(pins.pinned_checks("softmax"))
    lines = [json.loads(line) for line in run(
        "attlas", "verify", "toy-mask", "toy-case", "--json"
    ).splitlines()]  # fmt: skip
    assert {line["status"] for line in lines} == {"passed"}
    assert [line["name"] for line in lines].count("toy-mask") == counts["toy-mask"]
    assert [(line["name"], line["case"], line["check"]) for line in lines][-1] == (
        "toy-layer", "toy-case/a", "out.y"
    )  # fmt: skip
    rows = [json.loads(line) for line in run("attlas", "list", "--json").splitlines()]
    (row,) = (row for row in rows if row["slug"] == slug)
    assert row["implemented"]
    assert row["names"] == ["toy-layer", "toy-mask"]
