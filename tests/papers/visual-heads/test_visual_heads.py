"""What the row of visual heads says, but for a vision-language model, which there is not yet."""

from __future__ import annotations

import math

import pytest
import torch

from attlas.attach import attach
from attlas.contract.parts import prompt, small_llama
from attlas.parts.record.visual_heads import BlindHeads, VisualHeads, on_image, rank_correlation

IMAGE = ((2, 8),)


def test_visual_heads_of_synthetic_maps_are_exact():
    image = (torch.arange(16) < 6).view(1, 1, 1, -1)
    every = torch.zeros(1, 4, 2, 16, dtype=torch.float64)
    every[:, 0, :, :6] = 1 / 6  # all image, evenly
    every[:, 1, :, 6:] = 1 / 10  # all text
    every[:, 2] = 1 / 16  # uniform
    every[:, 3, :, 2] = 1.0  # all image, one token
    mass, concentration = on_image(every, image)
    expected = torch.tensor([1, 0, 6 / 16, 1], dtype=torch.float64)
    torch.testing.assert_close(mass[0, :, 0], expected, rtol=0, atol=1e-15)
    expected = torch.tensor([0, 1, 0, 1], dtype=torch.float64)  # the second has no mass to spread
    torch.testing.assert_close(concentration[0, :, 0], expected, rtol=0, atol=1e-12)


def test_visual_heads_are_means_over_text_behind_the_image():
    model, ids = small_llama(), prompt(14, 2)
    with torch.no_grad(), attach(model, VisualHeads(image=IMAGE), record=["weights"]) as session:
        model(ids)
        weights, found = session["weights"], session["visual-heads"]
    there = weights[..., 8:, 2:8]
    mass = there.sum(-1)
    share = there / mass[..., None]
    concentration = 1 + (share * share.log()).sum(-1) / math.log(6)
    torch.testing.assert_close(found["mass"], mass.mean(-1))
    torch.testing.assert_close(found["concentration"], (mass * concentration).sum(-1) / mass.sum(-1))


def test_visual_heads_leave_padding_out():
    model, ids = small_llama(), prompt(14)
    padded = torch.cat([torch.zeros_like(ids[:, :3]), ids], dim=1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = []
    behind = {"input_ids": padded, "attention_mask": mask, "position_ids": positions}
    for given in ({"input_ids": ids}, behind):
        recorder = VisualHeads(image=IMAGE)
        with torch.no_grad(), attach(model, record=[recorder]):
            model(**given)
        found.append(recorder.result())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6)


def test_visual_heads_blinded_see_no_image():
    model, ids = small_llama(), prompt(14)
    with torch.no_grad():
        plain = model(ids).logits
        with attach(model, BlindHeads(image=IMAGE, heads={1: [2]}), record=["weights"]) as session:
            out, weights = model(ids).logits, session["weights"]
    assert (weights[1, 0, 2, 8:, 2:8] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert (weights[1, 0, 1, 8:, 2:8] > 0).all()
    torch.testing.assert_close(out[:, :8], plain[:, :8])  # before and in the image nothing changes
    assert not torch.allclose(out[:, 8:], plain[:, 8:])


def test_visual_heads_rankings_are_compared_by_spearman():
    a = torch.tensor([[3.0, 1.0], [2.0, 10.0]])
    assert rank_correlation(a, a.exp()) == pytest.approx(1.0)
    assert rank_correlation(a, -a) == pytest.approx(-1.0)
    x, y = torch.tensor([1.0, 2.0, 2.0, 4.0, 5.0]), torch.tensor([2.0, 1.0, 3.0, 3.0, 9.0])
    ranks = torch.tensor([[1, 2.5, 2.5, 4, 5], [2, 1, 3.5, 3.5, 5]])
    assert rank_correlation(x, y) == pytest.approx(float(torch.corrcoef(ranks)[0, 1]))
    with pytest.raises(ValueError, match="cannot be compared"):
        rank_correlation(x, y[:2])
    with pytest.raises(ValueError, match="all alike"):
        rank_correlation(x, torch.ones(5))
