"""`attlas inspect`: findings, files and page of a small model; stopped and gone on; what is refused."""

from __future__ import annotations

import json

import pytest
import torch

import attlas
import tiny_folder
from attlas import attach
from attlas.catalog import registry
from attlas.cli import main
from attlas.errors import UserError
from attlas.inspect import find
from attlas.inspect import look as looking
from attlas.inspect.look import Looked, interesting, look
from attlas.inspect.page import atlas
from attlas.inspect.store import Store, key_of
from attlas.inspect.subject import Subject
from attlas.kinds.analysis import Analysis, Findings, Scores
from attlas.kinds.analysis import Table as Rows
from attlas.models.load import load, load_tokenizer
from attlas.parts.record.sink_mass import SinkMass
from attlas.view.look.atlas import read_back


class ToySinks(SinkMass):
    """Mean weight on the first token."""

    inspects = "roles"

    def head_scores(self):
        return {"sink": Scores(self.result().mean(dim=(1, 3)), "weight on the first token")}


class ToyAnalysis(Analysis):
    """A score of each head that says what it was asked for, with all that a page draws."""

    inspects = "flow"
    runs = 0

    def run(self, subject, tick):
        type(self).runs += 1
        tick(0.5)
        layers, heads = subject.layers, subject.heads
        tokens = subject.input_ids.shape[1]
        values = torch.arange(float(layers * heads)).view(layers, heads)
        values[0, 0] = torch.nan
        share = torch.eye(tokens).expand(layers, -1, -1)
        edges = torch.tensor([[-1.0, -1, 0, 1, 0.5], [0, 1, 1, 2, -2.0], [1, -1, layers, -1, 1.0]])
        return Findings(
            heads={"number": Scores(values, "its number")},
            arrays={"flow": share, "circuit": edges, "joint": torch.randn(layers, heads, 2, tokens, 2)},
            tables=[Rows("words <b>", ("word", "count"), [("a & b", 3)])],
            says=["The last head is the last."],
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder.save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def toys():
    ToyAnalysis.runs = 0
    attlas.mechanism("toy-sinks", paper="")(ToySinks)
    attlas.mechanism("toy-analysis", paper="")(ToyAnalysis)
    yield
    for name in ("toy-sinks", "toy-analysis"):
        registry.unregister(name)


def run(*arguments) -> int:
    try:
        main(["inspect", *map(str, arguments)])
    except SystemExit as ended:
        return ended.code or 0
    return 0


def test_it_writes_lines_of_heads_and_a_page_that_hold_what_was_found(folder, toys, tmp_path, capsys):
    names = ("--with", "toy-sinks,toy-analysis")
    assert run(folder, "--text", "To be, or <i>not</i> to be", *names, "--out", tmp_path) == 0
    out = capsys.readouterr().out
    assert "1.3 7" in out
    assert "The last head is the last." in out
    lines = [json.loads(line) for line in (tmp_path / "heads.jsonl").read_text().splitlines()]
    assert [(line["layer"], line["head"]) for line in lines] == [(x, h) for x in (0, 1) for h in range(4)]
    assert lines[0]["number"] is None
    assert lines[-1]["number"] == 7.0
    model, tokenizer = load(folder), load_tokenizer(folder)
    ids = torch.tensor([tokenizer("To be, or <i>not</i> to be")["input_ids"]])
    with torch.no_grad(), attach(model, record=["sink-mass"]) as session:
        model(ids)
    wanted = session["sink-mass"].mean(dim=(1, 3))
    found = torch.tensor([line["sink"] for line in lines]).view(2, 4)
    assert torch.allclose(found, wanted, atol=1e-6)
    html = (tmp_path / "index.html").read_text(encoding="utf-8")
    shown = read_back(html)
    assert torch.allclose(shown.scores["sink"].values, wanted, atol=1e-4)
    assert len(shown.patterns) == 4
    assert shown.circuit is not None
    assert len(shown.circuit.edges) == 3
    assert shown.flow is not None
    assert "<i>not" not in html


def test_a_stopped_run_goes_on_behind_what_it_found(folder, toys, tmp_path, monkeypatch, capsys):
    asked = (folder, "--text", "To be", "--with", "toy-analysis", "--out", tmp_path)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(looking, "patterns", stop)
    assert run(*asked) == 130
    assert "goes on from there" in capsys.readouterr().out
    monkeypatch.undo()
    assert run(*asked) == 0
    assert ToyAnalysis.runs == 1
    assert run(folder, "--text", "Not to be", *asked[3:]) == 0  # another text is looked at anew
    assert ToyAnalysis.runs == 2


def test_presets_are_what_papers_say(toys):
    assert "toy-sinks" in [named.label for named in find.chosen("roles")]
    assert "toy-analysis" in [named.label for named in find.chosen("flow")]
    assert [named.label for named in find.chosen("roles", ["toy-analysis"])] == ["toy-analysis"]


def test_two_models_are_laid_side_by_side(folder, toys, tmp_path):
    asked = ("--preset", "compare", "--with", "toy-sinks", "--out", tmp_path, "--text", "To be or not")
    assert run(folder, *asked, "--against", "+ablate-heads(scale=0.0)") == 0
    shown = read_back((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert shown.compare is not None
    own, other = (x["sink"].values for x in (shown.scores, shown.compare.scores))
    assert torch.allclose(own[0], other[0], atol=1e-4)  # nothing was ablated below the first layer
    assert not torch.allclose(own[1], other[1], atol=1e-4)


def test_a_notebook_shows_the_page(folder, toys):
    model, tokenizer = load(folder), load_tokenizer(folder)
    looked = look(model, text="To be", tokenizer=tokenizer, names=["toy-sinks"])
    assert "<iframe" in looked._repr_html_()
    assert len(looked.patterns) == 4


def test_interesting_heads_are_the_first_of_each_score():
    a = Scores(torch.tensor([[0.0, 3.0], [1.0, 2.0]]), "a")
    b = Scores(torch.tensor([[5.0, torch.nan], [1.0, 2.0]]), "b")
    assert interesting({"a": a, "b": b}, 3) == [(0, 1), (0, 0), (1, 1)]
    assert a.top(2) == [(0, 1), (1, 1)]
    assert b.top(9) == [(0, 0), (1, 1), (1, 0)]


def test_weights_alone_are_shown_without_a_text(folder, toys):
    subject = Subject(load(folder))
    values = torch.ones(2, 4)
    looked = Looked(subject, "m", {"w": Findings(heads={"w": Scores(values, "w")})})
    assert read_back(atlas(looked).page()).scores["w"].values.sum() == 8


def test_a_store_keeps_findings_whole_or_not_at_all(folder, tmp_path):
    subject = Subject(load(folder), input_ids=torch.tensor([[1, 2]]))
    store = Store(tmp_path, key_of(subject, "m"))
    scores = Scores(torch.tensor([[1.0, torch.nan]]), "m")
    found = Findings({"s": scores}, {"a": torch.ones(2)}, says=["x"])
    store.save("a(b='c')", found)
    again = store.load("a(b='c')")
    assert again is not None
    assert torch.equal(again.heads["s"].values.nan_to_num(), found.heads["s"].values.nan_to_num())
    assert again.says == ["x"]
    (tmp_path / "findings" / "a_b__c__.json").write_text("{", encoding="utf-8")
    assert store.load("a(b='c')") is None
    assert Store(tmp_path, key_of(subject, "other")).load("a(b='c')") is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", " "], "empty"),
        (["--text", "a", "--file", "b"], "not both"),
        (["--file", "nowhere.txt"], "cannot be read"),
        (["--preset", "rolls"], "roles"),
        (["--preset", "compare"], "--against"),
        (["--with", "snapkv(keep=0.5)"], "recorders and analyses"),
        (["--with", "entropy"], "no score of heads"),
        (["--task", "indirect-object", "--with", "toy-sinks"], "indirect-objects"),
        (["--task", "multiple-choice", "--with", "toy-sinks"], "one token"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(folder, toys, tmp_path, capsys, arguments, words):
    assert run(folder, *arguments, "--out", tmp_path) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


def test_a_folder_that_cannot_be_written_is_refused(folder, toys, tmp_path, capsys):
    (tmp_path / "taken").write_text("a file", encoding="utf-8")
    assert run(folder, "--text", "To be", "--with", "toy-sinks", "--out", tmp_path / "taken") == 2
    assert "choose another folder" in capsys.readouterr().err


def test_models_that_cannot_be_watched_are_refused(toys):
    with pytest.raises(UserError, match="needs text"):
        look(attlas.ConvNet(attlas.ConvNetConfig()), names=["toy-sinks"])
