"""`attlas compare --preset prefill`: what thins out a prompt, with the density that it reached."""

from __future__ import annotations

import pytest
import torch

import attlas
from attlas.attach.thinned import Thinned
from attlas.catalog import registry
from attlas.cli import main
from attlas.compare import run
from attlas.compare.methods import comparable, parse_method, parse_methods
from attlas.compare.results import Results
from attlas.compare.shared import Reading, forward, stepwise
from attlas.masks import window
from attlas.tasks.compare.alone import density_by_head
from attlas.tasks.compare.speed import density
from attlas.tasks.roof import Roof

TOY = "toy-near(dense_layers=(1,))"


@pytest.fixture
def toy():
    @attlas.mechanism("toy-near", paper="")
    class ToyNear(Thinned):
        """Toy: the nearest tokens."""

        comparable = ("(dense_layers=(1,))",)

        def pattern(self, text):
            return window(32)

    yield ToyNear
    registry.unregister("toy-near")


def test_its_family_is_what_parts_that_thin_out_prompts_declare(toy):
    declared = comparable("prefill")
    assert declared[0] == "full"
    assert TOY in declared
    assert TOY not in comparable("cache")
    assert not set(declared) & set(comparable("cache")) - {"full"}
    methods = parse_methods(declared)
    assert [method.label for method in methods] == declared
    assert [method.thins for method in methods] == [False] + [True] * (len(methods) - 1)
    # A quarter and an eighth of the pairs each.
    names = [label.partition("(")[0] for label in declared[1:] if label != TOY]
    assert all(names.count(name) == 2 for name in names)
    assert not parse_method("snapkv").thins


def test_the_run_tells_the_density_of_each_layer_and_head(
    toy, tiny_preset, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(run, "measure_roof", lambda *_: Roof(1e9, 1e9))
    out = tmp_path / "out"
    arguments = ["--model", str(folder), "--preset", "tiny", "--out", str(out), "--methods"]
    arguments += [f"full,{TOY},snapkv", "--tasks", "speed,fidelity"]
    with pytest.raises(SystemExit) as ended:
        main(["compare", *arguments])
    assert ended.value.code == 0
    lines = Results(out).lines  # as the next run reads them
    assert {line["status"] for line in lines} == {"ok"}
    told = [line for line in lines if line["metric"] == "density"]
    assert [line["method"] for line in told] == [TOY]
    assert not any("by_head" in line for line in lines if line["metric"] != "density")
    near, every = told[0]["by_head"][:2]
    assert all(x == 1.0 for x in every)
    # 320 tokens in blocks of 32: the first row reads one block, the nine others two of those before.
    assert near == pytest.approx([19 / 55] * len(near), abs=1e-4)
    heads = [x for row in told[0]["by_head"] for x in row]
    assert told[0]["value"] == pytest.approx(sum(heads) / len(heads), abs=1e-4)
    floors = {line["method"]: line["floor"] for line in lines if line["metric"] == "prefill_ms"}
    assert floors[TOY] < floors["full"]
    kl = {line["method"]: line["value"] for line in lines if line["metric"] == "kl"}
    assert kl["full"] < 1e-6 < kl[TOY]
    table = (out / "table.md").read_text()
    head = next(line for line in table.splitlines() if "density %" in line)
    at = head.split("|").index(" density % ↓ ")
    shown = {row.split("|")[1].strip(): row.split("|")[at].strip()
             for row in table[table.index(head):].splitlines() if row.startswith("| `")}  # fmt: skip
    assert shown["`full`"] == "100.0"
    assert shown["`snapkv(keep=0.5)`"] == "–"
    assert shown[f"`{TOY}`"] == f"{100 * told[0]['value']:.1f}"
    page = (out / "report.html").read_text("utf-8")
    assert "density % by layer and head" in page
    assert page.count('<th scope="col">layer</th>') == 1


def test_without_such_a_method_there_is_no_column(tiny_preset, make_grid):
    grid = make_grid()
    assert "density" not in {cell.metric for cell in grid.all_cells()}
    grid = make_grid(methods=parse_methods(["full,sparse-prefill(recent=64)"]))
    told = [cell for cell in grid.all_cells() if cell.metric == "density"]
    assert [cell.method for cell in told] == ["sparse-prefill(recent=64)"]


def test_decoding_after_it_is_exact(toy, folder):
    """Tokens of a continuation come one by one, and each reads the whole cache."""
    method = parse_method("toy-near")
    assert stepwise(method.parts())
    model = attlas.load(str(folder))
    ids = torch.arange(3, 99)[None]
    reading = Reading.of(model, ids[0].tolist(), [method])
    more = torch.arange(50, 58)[None]
    with torch.inference_mode():
        with reading.attached(method):
            cache, _ = reading.fork(method)
            found = [forward(model, token, cache).logits for token in more.split(1, dim=1)]
            cache, _ = reading.fork(method)
        exact = forward(model, more, cache, logits=0).logits  # the bare model, behind the same cache
    torch.testing.assert_close(torch.cat(found, dim=1), exact, atol=1e-4, rtol=1e-4)


def test_density_is_the_mean_over_layers_and_heads_and_keeps_each():
    found = density([((1.0, 0.5), (0.0, 0.5)), ((1.0, 0.5), (0.5, 0.5))])
    assert found.by_head == ((1.0, 0.5), (0.25, 0.5))
    assert found.value == pytest.approx(0.5625)
    assert found.n == 2


def test_a_window_tells_its_blocks(folder):
    """The sparse prefill tells the same density as its pattern by blocks."""
    model = attlas.load(str(folder))
    part = attlas.make("sparse-prefill", sinks=4, recent=32)
    with torch.no_grad(), attlas.attach(model, part):
        model(torch.arange(3, 323)[None])
    rows = density_by_head((part,), model)
    assert len(rows) == model.config.num_hidden_layers
    # The first block too: one of it in the rows that the window does not reach it from.
    assert rows[0][0] == pytest.approx((19 + 8) / 55)
