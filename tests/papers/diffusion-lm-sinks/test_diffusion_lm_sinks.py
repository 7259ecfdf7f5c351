"""Sinks of a diffusion language model: the definition, hiding, and the published metric."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import attlas
from attlas.attach import attach
from attlas.contract.cases import load_cases, run_case
from attlas.kinds.expect import by_label
from attlas.models.decoder import Decoder, DecoderConfig
from attlas.models.encoder import EncoderConfig, EncoderForMaskedLM
from attlas.studies.diffusion_lm_sinks import (
    MASK,
    HideTokens,
    masked_loss,
    next_loss,
    overlap,
    sinks_of,
    watched,
)
from attlas.study.record import rows_of

RECORD = Path(__file__).parents[3] / "benchmarks" / "claims" / "diffusion-lm-sinks.json"
SIZES = {"vocab_size": MASK + 1, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_diffusion_lm_sinks_are_recorded_as_the_published_metric_has_them():
    """The recorder of every step is that of column sums."""
    golden = Path(__file__).parents[1] / "column-sums" / "golden"
    (case,) = [case for case in load_cases(golden) if case.name == "attention-sink-metric"]
    assert [r.reason for r in run_case(case) if r.status != "passed"] == []


def test_diffusion_lm_sinks_receive_more_than_the_others_by_epsilon():
    received = torch.tensor([[6.0, 1, 1, 1, 1], [3.9, 1.5, 1.5, 1.5, 1.6]])
    assert sinks_of(received, 3.0).tolist() == [[True] + [False] * 4, [False] * 5]
    assert sinks_of(received, 2.0)[1].tolist() == [True] + [False] * 4


def test_diffusion_lm_sinks_overlap():
    first = torch.tensor([[[True, False, True], [False] * 3]])
    last = torch.tensor([[[True, True, False], [False] * 3]])
    assert overlap(first, last) == pytest.approx(1 / 3)
    assert overlap(first[:, 1:], last[:, 1:]) == 1


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_diffusion_lm_sinks_received_and_hidden(kind):
    """What is hidden is received by itself alone, and the loss of nothing hidden is the plain one."""
    torch.manual_seed(0)
    whole = kind == "encoder"
    made = EncoderForMaskedLM(EncoderConfig(**SIZES)) if whole else Decoder(DecoderConfig(**SIZES))
    model = made.eval()
    tokens = torch.randint(0, 256, (3, 10))
    under = torch.zeros(3, 10, dtype=torch.bool)
    under[:, 4:7] = True
    chosen = torch.zeros(2, 3, 10, dtype=torch.bool)

    def loss():
        return masked_loss(model, tokens, under) if kind == "encoder" else next_loss(model, tokens)

    with torch.no_grad():
        plain = loss()
        torch.testing.assert_close(watched(model, tokens)[1].sum(-1), torch.full((2, 3), 10.0))
        with attach(model, HideTokens().hide(chosen)):
            torch.testing.assert_close(loss(), plain)
        chosen[0, :, 2] = True
        with attach(model, HideTokens().hide(chosen), record=["weights"]) as session:
            model(tokens)
        maps = session["weights"]
        assert not maps[0, :, :, :2, 2].any()
        assert not maps[0, :, :, 3:, 2].any()
        assert (maps[0, :, :, 2, 2] > 0).all()
        assert maps[1, :, :, 3:, 2].all()


def test_diffusion_lm_sinks_all_bytes_are_written():
    study = attlas.make("diffusion-lm-sinks", length=12, rounds=5, texts=3, dim=8, layers=1, heads=2)
    model = EncoderForMaskedLM(EncoderConfig(**SIZES)).eval()
    texts = torch.randint(0, 256, (3, 13))
    masks = []

    def seen(module, args, kwargs):
        masks.append(int((kwargs["input_ids"] == MASK).sum(1).max()))

    handle = model.model.register_forward_pre_hook(seen, with_kwargs=True)
    with torch.no_grad():
        steps = study._written(model, texts, torch.Generator().manual_seed(0))
    handle.remove()
    assert len(steps) == 5
    assert masks == sorted(masks, reverse=True)
    assert masks[0] == 9  # a quarter is given
    assert masks[-1] <= 2


def test_diffusion_lm_sinks_stand_under_masks_but_for_the_begin_token():
    study, draw = attlas.make("diffusion-lm-sinks"), torch.Generator().manual_seed(0)
    for share in (0.0, 0.5, 1.0):
        under = study._under(torch.zeros(50, 13), share, draw)
        assert not under[:, 0].any()
        assert under.any(1).all()
    assert under[:, 1:].all()


def test_diffusion_lm_sinks_committed_result():
    """They move in every seed, and the twin is hurt more; its sinks are the first token alone in 87 %."""
    record = json.loads(RECORD.read_text())
    rows = rows_of(record)
    of = {name: [row.value for row in found] for name, found in by_label(rows).items()}
    assert all(share < 0.5 for share in of["overlap of first and last step"])
    assert all(a < b for a, b in zip(of["rise, diffusion"], of["rise, twin"], strict=True))
    study = attlas.make("diffusion-lm-sinks")
    answers = [one.answer(rows) for one in study.expects]
    assert answers == ["yes", "no", "yes"]
    assert study.verdict(rows) == record["verdict"] == "partly"
    assert (study.claim, study.set_up) == (record["claim"], record["set_up"])
