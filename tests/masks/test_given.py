"""Masks as users hold them: booleans, a tokenizer's integers, and floats that are added to scores."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attlas
from attlas import masks
from attlas.models.decoder import Decoder, DecoderConfig
from attlas.models.encoder import EncoderConfig, EncoderForSequenceClassification

SEEN = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
LEAST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("hidden", [-torch.inf, LEAST, -1e9, -10000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 6), (2, 1, 1, 6)])
def test_added_to_scores(hidden: float, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    pairs = SEEN.view(shape)
    added = torch.zeros(shape).masked_fill(~pairs, hidden).to(dtype)
    assert (masks.seen(added) == pairs).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float32, torch.float16])
def test_ones_and_zeros_at_tokens(dtype: torch.dtype) -> None:
    assert (masks.seen(SEEN.to(dtype)) == SEEN).all()


@pytest.mark.parametrize("wrong", [
    torch.rand(2, 6), torch.full((2, 6), 0.5), torch.tensor([[1.0, 0.0, -torch.inf]]),
    torch.rand(2, 1, 6, 6), torch.ones(2, 1, 6, 6).tril(), torch.full((2, 6), torch.nan),
])  # fmt: skip
def test_other_floats_are_refused_by_name(wrong: Tensor) -> None:
    with pytest.raises(ValueError, match=r"attention_mask of floats takes .* bool mask"):
        masks.seen(wrong, "attention_mask")
    with pytest.raises(RuntimeError, match="bool mask"):
        torch.compile(masks.seen, backend="eager", fullgraph=True)(wrong)


@pytest.mark.parametrize("make", [masks.padding, masks.table])
def test_patterns_take_no_floats(make: object) -> None:
    with pytest.raises(Exception, match=r"valid|pairs"):
        make(torch.zeros(2, 6))  # type: ignore[operator]


def decoder() -> tuple[Decoder, Tensor]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Decoder(DecoderConfig(vocab_size=20, **sizes)).eval(), torch.randint(1, 20, (2, 6))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_model_takes_a_tokenizers_mask(dtype: torch.dtype) -> None:
    model, ids = decoder()
    padded = model(ids, attention_mask=SEEN).logits
    assert torch.equal(model(ids, attention_mask=SEEN.to(dtype)).logits, padded)
    everything = torch.ones(2, 6, dtype=dtype)
    assert torch.equal(model(ids, attention_mask=everything).logits, model(ids).logits)


def test_a_model_takes_what_is_added_to_scores() -> None:
    model, ids = decoder()
    pairs = torch.ones(6, 6, dtype=torch.bool).tril() & SEEN[:, None, None]
    added = torch.zeros(2, 1, 6, 6).masked_fill(~pairs, LEAST)
    found = model(ids, attention_mask=added).logits
    torch.testing.assert_close(found, model(ids, attention_mask=pairs).logits)


def test_a_model_is_not_told_by_nothing_but_zeros() -> None:
    model, ids = decoder()
    with pytest.raises(ValueError, match="attention_mask of floats and nothing but zeros"):
        model(ids, attention_mask=torch.zeros(2, 6))
    layer, x = attlas.make("softmax", dim=16, heads=2), torch.randn(2, 6, 16)
    assert torch.equal(layer(x, mask=torch.zeros(2, 6)), layer(x))  # nn.MultiheadAttention's padding


def test_a_classifier_takes_the_mean_of_tokens() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = EncoderForSequenceClassification(EncoderConfig(vocab_size=20, **sizes)).eval()
    ids, added = torch.randint(1, 20, (2, 6)), torch.zeros(2, 6).masked_fill(~SEEN, -torch.inf)
    found = model(ids, attention_mask=added).logits
    torch.testing.assert_close(found, model(ids, attention_mask=SEEN).logits)
    with pytest.raises(ValueError, match=r"attention_mask must be \[batch, tokens\]"):
        model(ids, attention_mask=SEEN[:, None, None])


def test_a_table_is_not_read_before_its_first_row() -> None:
    pairs = torch.ones(3, 2, dtype=torch.bool)
    assert masks.dense(masks.table(pairs), 3, 2)[0, 0].tolist() == [
        [False, False], [True, True], [True, True],
    ]  # fmt: skip
