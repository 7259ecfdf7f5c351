"""Every code block of README and docs runs; the generated table is up to date."""

import re
import shlex
import sys
import types
from collections import Counter
from pathlib import Path

import pytest

import attlas
from attlas.catalog import registry
from attlas.catalog.table import markdown
from attlas.cli import main
from attlas.study.page import page as claims_page

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def blocks(page: Path) -> list[tuple[str, str]]:
    return BLOCK.findall(page.read_text())


@pytest.fixture
def registered():
    """Forget what a page registers."""
    before = {e.name for e in registry.entries()}
    yield
    for entry in registry.entries():
        if entry.name not in before:
            registry.unregister(entry.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_run(page: Path, registered, tmp_path, monkeypatch, request, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    if "smollm2" in page.read_text():
        request.getfixturevalue("smollm2")
    module = types.ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # a page is a file like any other
    names = vars(module)
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, f"{page.name}", "exec"), names)
        elif language == "console":
            for line in re.findall(r"^\$ (.*)$", text, re.M):
                run(line)
        else:
            assert language in ("", "text"), f"{page.name}: a block of {language!r} is not run"


def run(line: str) -> None:
    program, *arguments = shlex.split(line, comments=True)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert arguments[0] in targets
    elif program == "attlas":
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code in (0, None), line
    else:
        assert program in ("git", "cd"), line


def test_table_is_up_to_date():
    assert (ROOT / "docs" / "mechanisms.md").read_text() == markdown(), "run `make docs`"


def test_files_of_the_table_are_told_wherever_a_checkout_lies(monkeypatch):
    package = Path(attlas.__file__).parent
    for entry in registry.entries():
        assert (package.parent / entry.file).is_file(), entry.file
    # As in a clone called like the package.
    softmax = registry.find("softmax")
    module = sys.modules[softmax.object.__module__]
    before, name = softmax.file, Path(module.__file__).name
    monkeypatch.setattr(module, "__file__", f"/attlas/one/attlas/src/attlas/{name}")
    assert softmax.file == before


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith(("http:", "https:", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_claims_page_is_generated_from_the_results():
    made = claims_page(ROOT / "benchmarks" / "claims")
    assert (ROOT / "docs" / "claims.md").read_text() == made, "run `make docs`"


def test_speed_table_is_generated_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from speed_table import table

    results = ROOT / "benchmarks" / "results" / "mechanisms-cuda.json"
    assert (ROOT / "benchmarks" / "mechanisms.md").read_text() == table(results)


def test_which_cache_is_generated_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from which_cache import page

    assert (ROOT / "docs" / "which-cache.md").read_text() == page(ROOT / "benchmarks" / "cache")


def test_which_prefill_is_generated_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from which_prefill import page

    assert (ROOT / "docs" / "which-prefill.md").read_text() == page(ROOT / "benchmarks" / "prefill")


def test_the_readme_counts_what_there_is():
    counts = Counter(entry.kind.name for entry in registry.entries())
    text = (ROOT / "README.md").read_text()
    told = {"layer": "layers", "select": "selections", "record": "recorders", "study": "studies",
            "task": "tasks"}  # fmt: skip
    for kind, word in told.items():
        assert f"{counts[kind]} {word}" in text
    assert re.search(rf"{counts['cache']} cache\s+policies and quantisers", text)
