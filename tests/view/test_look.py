"""The page of one model looked into: its data, what it refuses, notebooks."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import pytest
import torch

from attlas.errors import UserError
from attlas.parts.record.pyramid import WHOLE, Builder
from attlas.view.look.atlas import Atlas, read_back
from attlas.view.look.contents import NUMBERS, TOKENS, Compare, Grid, Pyramid
from view.look_examples import EVIL, causal, example


def close(found: object, expected: object) -> None:
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(
            found, expected.to(found.dtype), atol=1e-4, rtol=0, equal_nan=True
        )
    elif hasattr(expected, "__dataclass_fields__"):
        for name in expected.__dataclass_fields__:
            close(getattr(found, name), getattr(expected, name))
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for name, value in expected.items():
            close(found[name], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            close(a, b)
    else:
        assert found == expected


# Data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 60, 700])
def test_everything_reads_back(tokens):
    one = Atlas("m", ["a"], patterns={(0, 0): Pyramid.of(torch.ones(1, 1))})
    atlas = example(tokens) if tokens > 1 else one
    close(read_back(atlas.page()), atlas)


@pytest.mark.parametrize("tokens", [5, 300, 513, 5000])
def test_pyramid_is_the_same_in_blocks(tokens):
    weights, builder, row = causal(tokens), Builder(), 0
    for size in (1, 2, 7, 100, 333, tokens):
        stop = min(tokens, row + size)
        builder.add(weights[row:stop, :stop])
        row = stop
    close(builder.result(), Pyramid.of(weights))


@pytest.mark.parametrize("tokens", [300, 700, 5000])
def test_pyramid_says_what_it_says_it_does(tokens):
    weights = causal(tokens)
    pyramid = Pyramid.of(weights)
    for row, column in [(0, 0), (3, 1), (pyramid.mass.shape[0] - 1, 2)]:
        rows = slice(row * pyramid.cell, (row + 1) * pyramid.cell)
        block = weights[rows, column * pyramid.cell : (column + 1) * pyramid.cell]
        torch.testing.assert_close(pyramid.maxima[row, column], block.max())
        torch.testing.assert_close(pyramid.mass[row, column], block.sum(dim=1).mean())
    if tokens <= WHOLE:
        assert torch.equal(pyramid.whole, weights)
        return
    assert pyramid.whole is None
    top = weights.topk(16, dim=1).values
    close(pyramid.weight.sort(dim=1, descending=True).values, top)
    close(pyramid.rest, 1 - top.sum(dim=1))
    kept = pyramid.dense() > 0
    assert torch.equal(pyramid.dense()[kept], weights[kept])
    assert bool((pyramid.index.diff(dim=1)[20:] > 0).all())  # in the order of the keys


def test_pyramid_of_32k_tokens_is_linear_in_the_length():
    """Blocks of rows of so long a text; what is kept is far below one row times another."""
    tokens, builder = 32768, Builder()
    block = torch.rand(64, tokens) ** 8
    for _ in range(tokens // 64 // 16):  # every sixteenth block, the others alike
        builder.add(block / block.sum(dim=1, keepdim=True))
    pyramid = builder.result()
    assert (pyramid.cell, max(pyramid.mass.shape)) == (32, 1024)
    assert pyramid.numbers < 200 * tokens


def test_pyramid_takes_back_rows_of_short_texts_alone():
    weights, builder = causal(40), Builder()
    builder.add(weights)
    builder.take_back(33)
    close(builder.result(), Pyramid.of(weights[:33, :33]))
    builder = Builder()
    builder.add(causal(WHOLE + 1))
    with pytest.raises(ValueError, match="cannot be taken back"):
        builder.take_back(3)


def test_pyramid_of_other_keys_than_queries():
    weights = torch.rand(30, 900).softmax(dim=-1)
    atlas = Atlas("m", ["q"] * 30, patterns={(0, 0): Pyramid.of(weights)}, keys=["k"] * 900)
    close(read_back(atlas.page()), atlas)


# Text ------------------------------------------------------------------------------------------------


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)


def test_text_of_users_and_models_is_only_text():
    html = example().page()
    assert EVIL not in html
    elements = Elements()
    elements.feed(html)
    assert "img" not in elements.tags
    assert elements.tags.count("script") == 2 + len(re.findall('id="blob-', html))
    assert html.encode("utf-8")  # and what no text may hold is written as an escape
    assert "\x07" not in html


def test_the_page_knows_no_address():
    html = example().page().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|<[^>]+ (src|href)=|url\(|@import", html)
    assert "default-src 'none'" in html


def test_the_page_of_2k_tokens_is_small():
    grids = {f"score {i}": Grid(torch.rand(30, 9)) for i in range(8)}
    heads = {(layer, 0): Pyramid.of(causal(2048, layer, previous=layer)) for layer in range(4)}
    assert len(Atlas("m", [" word"] * 2048, grids, heads).page()) < 2e6


# Refusals --------------------------------------------------------------------------------------------


def test_refusals_name_the_remedy():
    grid = Grid(torch.zeros(2, 2))
    with pytest.raises(UserError, match=r"at least one token, got none; give text or a file"):
        Atlas("m", [])
    with pytest.raises(UserError, match=rf"{TOKENS + 1} tokens and a page holds .* part of the text"):
        Atlas("m", ["a"] * (TOKENS + 1))
    with pytest.raises(UserError, match=r"300 × 100 heads and a page holds .* fewer layers"):
        Atlas("m", ["a"], {"s": Grid(torch.zeros(300, 100))})
    with pytest.raises(UserError, match="one shape"):
        Atlas("m", ["a"], {"s": grid}, compare=Compare("b", {"s": Grid(torch.zeros(2, 3))}))
    pattern = Pyramid.of(torch.ones(1, 1))
    with pytest.raises(UserError, match=r"head 0\.1 has 1 × 1 tokens and the text 2 × 2"):
        Atlas("m", ["a", "b"], patterns={(0, 1): pattern})
    large = replace(pattern, mass=torch.zeros(1).expand(NUMBERS // 4, 1))
    with pytest.raises(UserError, match=r"patterns of 3 heads .* about 1 would fit: name the heads"):
        Atlas("m", ["a"], patterns={(0, i): large for i in range(3)})
    with pytest.raises(UserError, match=r"layer below 6 and a head below 4"):
        example().head(6, 0)
    with pytest.raises(UserError, match="no page of"):
        read_back("<html></html>")


def test_a_folder_that_cannot_be_written_to(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*; choose another folder"):
        example().write(tmp_path / "none" / "page.html")
    assert example().write(tmp_path / "page.html").exists()


# Notebooks -------------------------------------------------------------------------------------------


def test_notebooks_show_the_page_in_a_frame_of_its_own():
    atlas = example()
    shown = atlas._repr_html_()
    assert shown.startswith("<iframe")
    assert 'sandbox="allow-scripts"' in shown
    assert "<script" not in shown
    inside = unescape(re.search('srcdoc="([^"]*)"', shown)[1])
    close(read_back(inside), atlas)


def test_notebooks_show_one_head():
    head = example().head(4, 0)
    assert list(head.patterns) == [(4, 0)]
    assert not head.neurons
    assert head.flow is None
    assert "head=4.0" in unescape(head._repr_html_())
    close(read_back(head.page()), head)
