"""The catalogue is complete, derived and searchable; a toy mechanism is found everywhere."""

import json
import operator
import re
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import attlas
from attlas.catalog import registry
from attlas.catalog.papers import paper, papers
from attlas.catalog.stages import STAGES
from attlas.catalog.table import markdown
from attlas.cli import main
from attlas.errors import UnknownName, UserError
from attlas.models.load import load_config, load_tokenizer


def cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code or 0


def test_rows_are_sound():
    rows = papers()
    slugs = [row.slug for row in rows]
    assert len(slugs) == len(set(slugs))
    assert len([r for r in rows if r.works_when]) == len(rows) >= 317
    assert all(set(row.stages) <= set(STAGES) for row in rows)


def test_every_paper_named_by_code_is_a_row():
    slugs = {row.slug for row in papers()}
    assert {e.paper for e in registry.entries() if e.paper} <= slugs


def test_filters():
    assert {p.group for p in papers(group="heads")} == {"heads"}
    assert all("mask" in p.stages for p in papers(stage="mask"))
    assert [p.slug for p in papers(search="one write-head")] == ["multi-query-attention"]
    assert all(p.entries for p in papers(implemented=True))


@pytest.mark.parametrize("wrong", [{"group": "haeds"}, {"kind": "leyer"}, {"stage": "scores"}])
def test_unknown_filters_suggest(wrong):
    with pytest.raises(UnknownName, match="did you mean"):
        papers(**wrong)


def test_list_json_has_one_object_a_line(capsys):
    assert cli("list", "--json", "--group", "weights") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    fields = {"slug", "title", "group", "kind", "stages", "implemented", "names", "file"}
    assert all(set(row) == fields for row in rows)
    done = {row["slug"] for row in rows if row["implemented"]}
    assert {"qk-norm", "differential-transformer", "sinkformer"} <= done


def test_show_of_what_exists_and_of_what_does_not(capsys):
    assert cli("show", "qk-norm") == 0
    assert "k̂ᵀ" in capsys.readouterr().out
    missing = next(p.slug for p in papers() if not p.entries)
    assert cli("show", missing) == 0
    assert "Works when" in capsys.readouterr().out


def test_show_of_one_mechanism_of_a_row_tells_of_it_alone(capsys):
    assert cli("show", "snapkv") == 0
    told = capsys.readouterr().out
    assert "SnapKV: the prompt's last queries" in told
    assert "PyramidKV:" not in told
    assert "Of the same row" in told


FAMOUS = tomllib.loads((files("attlas.catalog") / "famous.toml").read_text("utf-8"))["famous"]


@pytest.mark.parametrize("row", FAMOUS, ids=lambda row: row["names"][0])
def test_famous_names_are_answered_with_what_is_here(row, capsys):
    names = {name for entry in registry.entries() for name in entry.names}
    known = names | {p.slug for p in papers()}
    for name in row["names"]:
        assert name not in known
        assert cli("show", name) == 0
        with pytest.raises(ValueError, match=re.escape(row["here"])):
            attlas.make(name)
    for quoted in re.findall(r"`([^`]+)`", row["here"]):
        assert quoted in known or operator.attrgetter(quoted.removeprefix("attlas."))(attlas)
    for call in re.findall(r"attlas\.([\w.]+)\(", row["here"]):
        assert callable(operator.attrgetter(call)(attlas))


def test_the_version_and_short_help(capsys):
    assert cli("--version") == 0
    assert attlas.__version__ in capsys.readouterr().out
    for words in (["-h"], ["show", "-h"]):
        assert cli(*words) == 0
        assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["./nowhere", "~/nowhere", "a/b/c", "/nowhere", "tests/nowhere"])
def test_a_folder_that_is_not_there_is_asked_of_no_hub(name, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    for load in (attlas.load, load_config, load_tokenizer):
        with pytest.raises(UserError, match="there is no folder"):
            load(name)


def test_unknown_names_end_in_one_sentence(capsys):
    assert cli("show", "sinkfromer") == 2
    error = capsys.readouterr().err
    assert "sinkformer" in error
    assert error.count("\n") == 1
    with pytest.raises(UnknownName, match="differential"):
        attlas.make("diferential-transformer", dim=8)


def test_options_are_checked_by_name():
    with pytest.raises(ValueError, match="'hedas'"):
        attlas.make("multi-query-attention", dim=8, hedas=2)
    with pytest.raises(ValueError, match="'dim'"):
        attlas.make("softmax")


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="taken by"):

        @attlas.mechanism("qk-norm")
        class Other(attlas.Attention):
            """Another."""


@pytest.fixture
def toy():
    @attlas.mechanism("toy-mean", paper="", aliases=("toy",))
    class ToyMean(attlas.Attention):
        """Toy: every visible key weighs the same."""

        def normalize(self, scores: torch.Tensor) -> torch.Tensor:
            visible = (scores > -torch.inf).to(scores.dtype)
            return visible / visible.sum(-1, keepdim=True).clamp(min=1)

    yield ToyMean
    registry.unregister("toy-mean")


def test_a_toy_mechanism_is_found_without_being_named_anywhere(toy, capsys):
    assert cli("list", "--json", "--search", "toy-mean") == 0
    assert json.loads(capsys.readouterr().out)["stages"] == ["normalize"]
    assert cli("show", "toy-mean") == 0
    assert "toy-mean" in capsys.readouterr().out
    assert "`toy-mean`" in markdown()
    assert isinstance(attlas.make("toy", dim=8, heads=2), toy)
    assert paper("toy").slug == "toy-mean"
