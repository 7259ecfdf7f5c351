"""A mechanism in place of a pretrained model's self-attention."""

import copy

import pytest
import torch

import attlas
import tiny_models as tiny
from attlas.contract.families import FAMILIES
from attlas.models import swap as swapping

TAKEN = [f.name for f in FAMILIES if f.config().model_type in swapping.FAMILIES]


@pytest.mark.parametrize("kind", TAKEN)
def test_swap_to_softmax_changes_nothing(kind):
    model, ids = tiny.decoder(kind), tiny.prompt()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    logits, text = model(ids).logits, tiny.greedy(model, ids, attention_mask=mask)
    report = attlas.swap(model, "softmax")
    assert "all parameters kept" in str(report)
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert tiny.greedy(model, ids, attention_mask=mask) == text


def test_swap_names_what_is_new_and_generates():
    model, ids = tiny.decoder("llama"), tiny.prompt()
    report = attlas.swap(model, "differential-transformer", layers=[0, 1, 3])
    assert set(report.new) == {0, 1, 3}
    assert "lambda_q1" in report.new[0]
    assert "layers 0-1, 3: new: lambda_q1" in str(report)
    assert tiny.greedy(model, ids) == tiny.greedy(model, ids, use_cache=False)


@pytest.mark.parametrize(
    ("mechanism", "options", "said"),
    [
        ("differentail", {}, "differentail"),
        ("sinkformer", {}, "causal form"),
        ("softmax", {"layers": [4]}, "0..3"),
        ("softmax", {"depht": 4}, "depht"),
    ],
)
def test_swap_refuses_by_name_and_changes_nothing(mechanism, options, said):
    model = tiny.decoder("llama")
    before = str(model)
    with pytest.raises(ValueError, match=said):
        attlas.swap(model, mechanism, **options)
    assert str(model) == before
    with pytest.raises(TypeError, match="gpt2"):
        attlas.swap(tiny.decoder("gpt2"), "softmax")


def test_swap_keeps_smollm2(smollm2):
    model, tokenizer = copy.deepcopy(smollm2[0]), smollm2[1]
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
        attlas.swap(model, "softmax")
        torch.testing.assert_close(model(ids).logits, logits, rtol=1e-3, atol=1e-3)
