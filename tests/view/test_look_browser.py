"""The page of one model looked into, in a real browser without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attlas.view.look.atlas import Atlas
from attlas.view.look.contents import Flow, Grid, Pyramid
from browsing import opened, until
from view.look_examples import WORDS, example

CHECKS = Path(__file__).with_name("look_checks.js").read_text("utf-8")
VIEWS = ("pattern", "text", "lines", "neurons", "map")
#: Every frame of 32k tokens that are scrolled is drawn within this on a machine that does nothing else,
#: in milliseconds; half of them much sooner.
SLOWEST, MEDIAN = 500, 100


@pytest.fixture(scope="module")
def atlas():
    return example()


def cursor(page):
    return page.evaluate("({ ...state })")


def dense(page, name):
    """A head's pattern as the page's own program reads it."""
    rows = page.evaluate(
        """async (name) => {
          const pattern = patterns.get(name), found = [];
          for (let query = 0; query < pattern.queries; query++) {
            let row = null;
            while (!(row = rowOf(pattern, query, () => {}))) await new Promise((f) => setTimeout(f, 5));
            const line = new Array(pattern.keys).fill(0);
            row.keys.forEach((key, i) => (line[key] = row.weights[i]));
            found.push(line);
          }
          return found;
        }""",
        name,
    )
    return torch.tensor(rows)


def test_data_in_the_browser_equals_the_tensors(atlas, tmp_path):
    long = example(520)
    for each in (atlas, long):
        with opened(each, tmp_path) as page:
            for (layer, head), pattern in each.patterns.items():
                found = dense(page, f"{layer}.{head}")
                torch.testing.assert_close(found, pattern.dense(), atol=1e-4, rtol=0)
            found = page.evaluate("tensor(atlas.neurons[0].q).then((x) => [...x])")
            torch.testing.assert_close(torch.tensor(found), each.neurons[1, 2].q.flatten())
            cells = page.locator("#grid td")
            for layer, head in [(0, 0), (3, 2), (5, 3)]:
                value = each.scores["induction"].values[layer, head]
                label = cells.nth(layer * 4 + head).get_attribute("aria-label")
                assert label == f"Layer {layer}, head {head}: {value:.4f}"
            assert "none" in cells.nth(1).get_attribute("class")


def test_a_click_and_keys_move_over_the_grid(atlas, tmp_path):
    with opened(atlas, tmp_path) as page:
        page.locator("#grid td").nth(4 * 4).click()
        assert page.inner_text("#head-title") == "Layer 4, head 0"
        for key in ("ArrowUp", "ArrowRight", "ArrowRight"):
            page.keyboard.press(key)
        focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
        assert focused.startswith("Layer 3, head 2:")
        until(page, "document.getElementById('status').textContent.startsWith('Layer 3, head 2')")
        page.keyboard.press("Enter")
        assert page.inner_text("#head-title") == "Layer 3, head 2"
        assert "was not recorded" in page.inner_text("#view-pattern")
        page.locator("#view-pattern .chips button").first.click()
        assert page.inner_text("#head-title") == "Layer 1, head 2"
        page.locator("#ranked button").first.click()
        best = atlas.scores["induction"].values.nan_to_num(-1).argmax().item()
        assert page.inner_text("#head-title") == f"Layer {best // 4}, head {best % 4}"


def test_keys_alone_reach_and_use_everything(atlas, tmp_path):
    with opened(atlas, tmp_path, "#head=1.2&token=20") as page:
        reached, visible = [], True
        for _ in range(60):
            page.keyboard.press("Tab")
            name, ringed = page.evaluate(
                """() => {
                  const e = document.activeElement, style = (x) => getComputedStyle(x);
                  const box = e.closest("svg") && style(e.querySelector("rect")).strokeWidth === "2px";
                  const name = e.id || e.getAttribute("role") || e.tagName;
                  return [name, box || style(e).outlineStyle !== "none"];
                }"""
            )
            if name == "BODY":
                break
            reached.append(name)
            visible &= ringed
        for wanted in ("score", "gridcell", "tab-pattern", "search", "plot", "flow-plot"):
            assert wanted in reached, wanted
        assert visible
        page.focus("#plot")
        before = cursor(page)
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Shift+ArrowLeft")
        after = cursor(page)
        assert after["token"] == before["token"] + 1
        assert after["key"] == after["token"] - 10
        until(page, "document.getElementById('status').textContent.includes('query 21')")
        weight = atlas.patterns[1, 2].whole[after["token"], after["key"]]
        assert page.inner_text("#pattern-value").endswith(f"weight {weight:.4f}") or weight < 1e-3
        for view in VIEWS[1:]:
            page.focus(f"#tab-{VIEWS[VIEWS.index(view) - 1]}")
            page.keyboard.press("ArrowRight")
            assert page.is_visible(f"#view-{view}"), view


def test_a_drag_moves_and_the_wheel_zooms_once_the_pattern_has_focus(tmp_path):
    with opened(example(600), tmp_path, "#head=1.2") as page:
        box = page.locator("#plot").bounding_box()
        x, y = box["x"] + 300, box["y"] + 300
        page.mouse.move(x, y)
        page.mouse.wheel(0, -240)  # scrolls the page
        assert page.evaluate("seen.span") == 600
        page.focus("#plot")
        page.mouse.move(x, y)
        page.mouse.wheel(0, -240)
        until(page, "seen.span === 300")
        before = page.evaluate("({ ...seen })")
        page.mouse.down()
        page.mouse.move(x - 60, y - 40, steps=4)
        page.mouse.up()
        after = page.evaluate("({ ...seen, px: plot.px })")
        assert after["left"] - before["left"] == pytest.approx(60 / after["px"])
        assert after["top"] - before["top"] == pytest.approx(40 / after["px"])
        page.mouse.click(x, y)
        found = cursor(page)
        left, top = page.evaluate("[LEFT, TOP]")
        box = page.locator("#plot").bounding_box()
        assert found["key"] == int(after["left"] + (x - box["x"] - left) / after["px"])
        assert found["token"] == int(after["top"] + (y - box["y"] - top) / after["px"])


def test_links_lead_to_a_place_and_keep_it(atlas, tmp_path):
    with opened(atlas, tmp_path, "#head=4.0&score=sink&token=33&view=text&side=b") as page:
        assert page.inner_text("#head-title") == "Layer 4, head 0"
        assert page.input_value("#score") == "sink"
        until(page, "document.querySelector('#reading .now')?.dataset.token === '33'")
        page.click("#tab-lines")
        assert "view=lines" in page.evaluate("location.hash")
        page.evaluate("location.hash = '#head=1.2&token=7&view=neurons'")
        until(page, "document.getElementById('head-title').textContent === 'Layer 1, head 2'")
        page.wait_for_selector("#neuron-value:has-text('Query 7')")
    for wrong in ("#head=99.1&token=-4", "#head=<b>&score=none&view=x&token=1e9", "#%E0%A4%A"):
        with opened(atlas, tmp_path, wrong) as page:
            assert page.inner_text("#head-title").startswith("Layer ")


def test_search_jumps_to_tokens_and_over_their_borders(atlas, tmp_path):
    with opened(atlas, tmp_path) as page:
        hits = [i for i, token in enumerate(atlas.tokens) if "keeper" in token]
        page.fill("#search", "KEEPER")
        first = cursor(page)["token"]
        assert first in hits
        page.press("#search", "Enter")
        assert cursor(page)["token"] == hits[hits.index(first) + 1]
        page.click("#before")
        assert cursor(page)["token"] == first
        page.fill("#search", "old keep")
        assert cursor(page)["token"] in [hit - 1 for hit in hits]
        page.fill("#search", "nowhere")
        assert page.inner_text("#found") == "not found"


def test_the_neuron_view_sums_to_the_score(atlas, tmp_path):
    neuron = atlas.neurons[1, 2]
    with opened(atlas, tmp_path, "#head=1.2&view=neurons&token=9&key=4") as page:
        page.wait_for_selector("#neuron-value:has-text('key 4')")
        products, score = page.evaluate(
            "(() => { const p = pairOf(neuronData, 9, 4); return [[...p.products], p.score]; })()"
        )
        expected, total = neuron.score(9, 4)
        torch.testing.assert_close(torch.tensor(products), expected)
        assert score == pytest.approx(total, rel=1e-5)
        assert sum(products) * neuron.scaling == pytest.approx(total, rel=1e-5)
        assert page.locator(".neurons tbody tr").count() == 10  # of those that the query sees


def test_hostile_text_is_shown_and_not_run(atlas, tmp_path):
    with opened(atlas, tmp_path, "#head=1.2&view=text&token=56") as page:
        page.wait_for_selector("#reading span")
        assert page.locator("img").count() == 0
        shown = page.inner_text("#reading")
        assert "\\u{7}" in shown
        assert "\\u{202e}txt" in shown
        assert "<img src=x" in shown
        assert "<img src=x" in page.inner_text("#tables")


def test_flow_circuit_and_map_tell_what_is_under_the_cursor(atlas, tmp_path):
    with opened(atlas, tmp_path, "#head=1.2&view=map") as page:
        page.focus("#flow-plot")
        page.keyboard.press("ArrowDown")
        assert "takes from" in page.inner_text("#flow-value")
        page.focus("#circuit .node")
        page.keyboard.press("ArrowUp")
        assert page.inner_text("#circuit-value").startswith("Head 1.2, weight 0.9")
        page.focus("#map-plot")
        page.keyboard.press("ArrowLeft")
        assert page.inner_text("#map-value").split()[0] in ("Query", "Key")
        page.click("#tables th button >> nth=1")
        assert page.get_attribute("#tables th >> nth=1", "aria-sort") == "descending"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_texts_are_legible_and_controls_have_names(atlas, tmp_path, scheme, width):
    options = {"size": (width, 800), "color_scheme": scheme, "reduced_motion": "reduce"}
    with opened(atlas, tmp_path, "#head=1.2&token=20", **options) as page:
        for view in VIEWS:
            page.click(f"#tab-{view}")
            page.wait_for_timeout(80)
            found = page.evaluate(CHECKS)
            assert found["texts"] > 50
            assert found["controls"] > 20
            for problem in ("faint", "nameless", "twice", "dangling"):
                assert not found[problem], (view, problem)
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, f"{view} is {wide} wide"


def test_32k_tokens_scroll_without_a_stall(tmp_path):
    """Frame times while the pattern is scrolled from end to end, seen from afar and from near."""
    tokens = 32768
    # As a recorder would have built it, of rows that read their own token and fifteen others.
    own = torch.arange(tokens)[:, None]
    index = (torch.rand(tokens, 16) * own).int().sort(dim=1).values
    index[:, -1] = own[:, 0]
    weight = torch.rand(tokens, 16).softmax(dim=1)
    cells = torch.rand(1024, 1024).tril()
    pattern = Pyramid(tokens, tokens, 32, cells / 1024, cells, None, index, weight, torch.zeros(tokens))
    atlas = Atlas("long", [" " + WORDS[i % len(WORDS)] for i in range(tokens)],
                  {"s": Grid(torch.rand(2, 2))}, {(0, 0): pattern})  # fmt: skip
    with opened(atlas, tmp_path, "#head=0.0") as page:
        for span in (tokens, 12000, 2000, 60):
            times = page.evaluate(
                """async (span) => {
                  see({ span, top: 0, left: 0 });
                  await new Promise((f) => setTimeout(f, 400));
                  const times = [], frames = 60, room = tokens.length - span;
                  let last = null;
                  for (let i = 0; i < frames; i++) {
                    see({ top: (room * i) / frames, left: (room * i) / frames });
                    const now = await new Promise(requestAnimationFrame);
                    if (last !== null) times.push(now - last);
                    last = now;
                  }
                  return times.sort((a, b) => a - b);
                }""",
                span,
            )
            median, slowest = times[len(times) // 2], times[-1]
            print(f"{span} of {tokens} tokens: frames of {median:.1f} ms, the slowest {slowest:.1f} ms")
            assert median < MEDIAN, span
            assert slowest < SLOWEST, span


def test_a_page_of_scores_or_flow_alone(tmp_path):
    with opened(Atlas("m", ["a", "b"], {"s": Grid(torch.rand(2, 3))}), tmp_path) as page:
        assert page.locator("#grid td").count() == 6
        assert not page.is_visible("#head")
    flow = Flow(torch.zeros(2, 2, 1, dtype=torch.int), torch.ones(2, 2, 1), "")
    with opened(Atlas("m", ["a", "b"], flow=flow), tmp_path) as page:
        assert page.is_visible("#flow-plot")
        assert not page.is_visible("#heads")
    cross = Atlas("m", ["q"] * 5, patterns={(0, 0): Pyramid.of(torch.rand(5, 30))}, keys=["k"] * 30)
    with opened(cross, tmp_path) as page:
        for view in VIEWS[:3]:
            page.click(f"#tab-{view}")


def test_notebooks_run_the_page_inside_their_frame(atlas, tmp_path):
    notebook = f"<!doctype html><title>notebook</title><body>{atlas.head(4, 0)._repr_html_()}"
    with opened(notebook, tmp_path) as page:
        frame = page.frame_locator("iframe")
        frame.locator("html[data-ready]").wait_for(timeout=20_000)
        assert frame.locator("#head-title").inner_text() == "Layer 4, head 0"
        frame.locator("#tab-text").click()
        frame.locator("#reading span").first.wait_for()
