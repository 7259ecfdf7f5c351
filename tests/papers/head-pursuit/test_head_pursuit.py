"""What the row of head pursuit says, clause by clause."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attlas.analyses.head_pursuit import HeadPursuit, pursued
from attlas.contract.cases import load_cases, run_case
from attlas.contract.parts import small_llama
from attlas.errors import UserError
from attlas.inspect.subject import Subject


@pytest.mark.parametrize("case", load_cases(Path(__file__).parent / "golden"), ids=lambda c: c.label)
def test_published_vectors(case):
    assert [r.reason for r in run_case(case) if r.status != "passed"] == []


def unit(atoms, width):
    return torch.nn.functional.normalize(torch.randn(atoms, width), dim=-1)


def test_planted_directions_are_recovered():
    torch.manual_seed(0)
    dictionary = unit(300, 128)
    planted = torch.randperm(300)[:5]
    found = pursued(torch.randn(100, 5) @ dictionary[planted], dictionary, 5)
    assert set(found.chosen.tolist()) == set(planted.tolist())
    assert float(found.explained[-1]) == pytest.approx(1.0, abs=1e-5)


def test_residuals_never_increase():
    torch.manual_seed(1)
    found = pursued(torch.randn(40, 32).double(), unit(100, 32).double(), 30)
    assert bool((found.residuals.diff() <= 1e-12).all())
    assert found.chosen.unique().numel() == 30


@pytest.mark.parametrize("k", [0, 5])
def test_as_many_steps_as_atoms_at_most(k):
    with pytest.raises(UserError, match="k must be"):
        pursued(torch.randn(6, 8), unit(4, 8), k)


def test_words_need_a_tokenizer():
    with pytest.raises(UserError, match="tokenizer"):
        HeadPursuit(("red", "blue"), k=2).look(Subject(small_llama(), torch.ones(1, 4, dtype=torch.long)))
