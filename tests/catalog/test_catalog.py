"""The catalogue is complete, derived and searchable; a toy mechanism is found everywhere."""

import json

import pytest
import torch

import attlas
from attlas.catalog import registry
from attlas.catalog.papers import paper, papers
from attlas.catalog.stages import STAGES
from attlas.catalog.table import markdown
from attlas.cli import main
from attlas.errors import UnknownName


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
