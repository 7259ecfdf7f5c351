"""What the row of attention against post-hoc explanations says, sentence by sentence."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from attlas.studies.attention_vs_posthoc import (
    AttentionVsPosthoc,
    ClsReader,
    gradient,
    lime,
    lime_fit,
)


def _reader(words=30, tokens=12, heads=3):
    torch.manual_seed(0)
    model = ClsReader(words, 16, 8, 10, heads, 2, 0.3 * torch.randn(tokens, 16)).double()
    return model.requires_grad_(False)


def _ids(tokens=12, words=30):
    ids = torch.randint(2, words, (tokens,), generator=Generator().manual_seed(1))
    ids[0] = 0
    return ids


@pytest.mark.parametrize("label", [0, 1])
def test_attention_vs_posthoc_closed_form_equals_autograd_on_all_words(label) -> None:
    model = _reader()
    e = model.embed(_ids()).requires_grad_()
    (true,) = torch.autograd.grad(model(e)[label], e)
    found = gradient(model, e.detach(), label)
    torch.testing.assert_close(found[1:], true[1:], atol=1e-12, rtol=1e-6)
    # [cls] is asked by itself, which the closed form leaves out.
    assert (found[0] - true[0]).abs().max() > 1e-4


def test_attention_vs_posthoc_lime_approaches_its_closed_form_on_long_documents() -> None:
    model, ids = _reader(400, 90), _ids(90, 400)
    words = ids[1:].unique().tolist()
    told = lime(model, ids, torch.where(ids == 0, 0, 1), words, 1)
    fitted = lime_fit(model, ids, 1, words, 1, 20000, Generator().manual_seed(0))
    assert torch.corrcoef(torch.stack([told, fitted]))[0, 1] > 0.95


def test_attention_vs_posthoc_attention_ranks_bad_words_above_good_ones() -> None:
    rows = AttentionVsPosthoc(length=20, documents=5, samples=1000, steps=150).rows(0)
    told = {row.name: row.value for row in rows}
    assert told["gradient tells signs"] > 95
    assert told["LIME tells signs"] > 95
    assert told["attention tells signs"] < 80
    assert told["gradient, error"] < 1e-6


def test_attention_vs_posthoc_reads_the_cls_row_alone() -> None:
    model, ids = _reader(), _ids()
    e = model.embed(ids)
    seen = model.read(e)
    torch.testing.assert_close(seen.weights.sum(dim=-1), torch.ones(3, dtype=torch.float64))
    by_head = torch.einsum("ht,htv,hcv->c", seen.weights, seen.values, model.w) / 3
    torch.testing.assert_close(model(e), by_head)
    torch.testing.assert_close(model(torch.stack([e, e.flip(1)]))[0], model(e))


def test_attention_vs_posthoc_coefficients_are_zero_where_masking_changes_nothing() -> None:
    model, ids = _reader(), _ids()
    torch.testing.assert_close(
        lime(model, ids, ids, ids[1:].tolist(), 0), torch.zeros(11, dtype=torch.float64),
        atol=1e-12, rtol=0,
    )  # fmt: skip
