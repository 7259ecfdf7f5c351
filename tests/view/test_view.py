from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from attlas.compare.grid import Grid, Preset, parse_tasks
from attlas.compare.methods import Method
from attlas.compare.summary import Summary, summarize
from attlas.view import pareto, report, shell, table
from attlas.view.curves import costs, qualities

EVIL = "evil</script><script>alert(1)</script>&{body}"
PRESET = Preset("tiny", (64, 128), (0.1, 0.9), 2, 1, 8, 1, 1, ())


@pytest.fixture
def summary() -> Summary:
    methods = (
        Method("full"),
        Method("snapkv(keep=0.25)", (("snapkv", (("keep", 0.25),)),)),
        Method(f"toy(text='{EVIL}')", (("toy", (("text", EVIL),)),)),
    )
    grid = Grid(EVIL, methods, parse_tasks([]), (64, 128), PRESET, "cpu", "float32", 0)
    lines = []
    for number, cell in enumerate(grid.all_cells()):
        ok = number % 11 != 5
        lines.append(
            {"model": EVIL, **cell._asdict(), "value": 0.5 if ok else None, "low": 0.2,
             "high": 0.9, "sd": 0.1, "floor": None, "n": 2, "seconds": 1.0, "kv_bytes": 1,
             "status": "ok" if ok else "out of memory", "reason": "" if ok else EVIL,
             "seed": 0, "preset": "tiny", "device": "cpu", "dtype": "float32",
             "versions": {"torch": "2"}, "machine": EVIL}
        )  # fmt: skip
    return summarize(lines, grid)


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def page(summary: Summary, folder: Path) -> str:
    report.write(summary, folder / "report.html")
    return (folder / "report.html").read_text("utf-8")


def test_text_of_users_is_escaped(summary, tmp_path):
    html = page(summary, tmp_path)
    assert "<script>alert(1)" not in html
    assert "&lt;script&gt;alert(1)" in html
    figures = re.search(r'id="figures">(.*?)</script>', html, re.DOTALL)
    assert figures is not None
    assert json.loads(figures[1])
    elements = Elements()
    elements.feed(html)
    assert [tag for tag, _ in elements.found].count("script") == 3


def test_the_page_fetches_nothing(summary, tmp_path):
    html = page(summary, tmp_path)
    elements = Elements()
    elements.feed(html)
    for tag, attributes in elements.found:
        assert tag not in ("link", "iframe", "img", "object", "embed")
        assert "src" not in attributes
        assert not (attributes.get("href") or "").startswith("http")
    assert "default-src 'none'" in html
    css = shell.files("attlas.view").joinpath("page/page.css").read_text("utf-8")
    assert "url(" not in css
    assert "@import" not in css
    assert "prefers-color-scheme: dark" in css


def test_a_page_is_small_and_its_axes_begin_at_zero(summary, tmp_path):
    html = page(summary, tmp_path)
    assert len(html.encode()) < 1_500_000
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', html, re.DOTALL)[1])
    assert all(figure["zero"] for figure in figures)
    words = re.findall(r'<td class="words" data-value="([^"]*)"', html)
    assert "needle" in words
    assert not any(re.fullmatch(r"[\d.]+", word) for word in words)


def test_the_table_sorts_by_buttons_in_its_heads(summary, tmp_path):
    html = page(summary, tmp_path)
    assert html.count('<th scope="col" data-first=') == html.count('<button type="button">')
    assert "aria-sort" in html
    assert html.count('class="heat"') == 3 * len(summary.table)


def test_the_terminal_and_markdown_tables_hold_the_same_numbers(summary, tmp_path):
    console = Console(width=80, record=True, file=open(tmp_path / "null", "w"))  # noqa: SIM115
    console.print(table.terminal(summary))
    shown = console.export_text()
    assert "…" not in shown
    table.write(summary, tmp_path / "table.md")
    written = (tmp_path / "table.md").read_text("utf-8")
    for text in (shown, written):
        assert "snapkv" in text
        assert "keep=0.25" in text
        assert "out of memory" in text
        assert "95 %" in text
    assert "<script>" not in written.replace(f"`toy(text='{EVIL}')`", "")


def test_the_picture_is_drawn_or_left_out(summary, tmp_path):
    pareto.write(summary, tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    axis = Figure().subplots()
    pareto._draw(axis, summary, costs(summary)[0], qualities(summary)[0])
    assert axis.get_xlim()[0] == axis.get_ylim()[0] == 0
    only = [line for line in summary.lines if line["task"] == "needle"]
    pareto.write(summarize(only, summary.grid), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    assert "Where needles are found" in page(summarize(only, summary.grid), tmp_path)
