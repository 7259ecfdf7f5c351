"""Encoder–decoders whose cross-attention knows which step it is, or what it saw at earlier ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

import attlas
from attlas.hf.caches import cache_of, with_cache

SOURCE = torch.arange(3, 21).reshape(2, 9)
WALKING = ("gmm-attention", "dynamic-convolution-attention")


def _model(**cross: Any) -> attlas.Seq2Seq:
    torch.manual_seed(0)
    return attlas.Seq2Seq(attlas.Seq2SeqConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3, cross_attention={"heads": 1, **cross},
    )).eval()  # fmt: skip


def _greedy(model: attlas.Seq2Seq, mask: torch.Tensor, count: int) -> torch.Tensor:
    """Token by token, each from a pass over the whole target so far."""
    target = torch.ones(2, 1, dtype=torch.long)
    for _ in range(count):
        logits = model(SOURCE, mask, decoder_input_ids=target, use_cache=False).logits
        target = torch.cat((target, logits[:, -1:].argmax(-1)), dim=1)
    return target


@pytest.mark.parametrize("cross", [
    *({"name": name} for name in WALKING),
    {"name": "multi-token-attention", "heads": 4},
    {"name": "luong-attention", "alignment": "monotonic", "window": 1},
])  # fmt: skip
def test_generate_gives_what_passes_over_the_whole_target_give(cross: dict[str, Any]) -> None:
    model, mask = _model(**cross), torch.ones_like(SOURCE)
    for name, weights in model.named_parameters():
        if name.endswith("kernel"):  # which begins as the identity
            torch.nn.init.normal_(weights)
    mask[0, 6:] = 0
    wanted = _greedy(model, mask, 8)
    for cached in (True, False):
        found = model.generate(
            SOURCE, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False,
            use_cache=cached,
        )  # fmt: skip
        assert torch.equal(found, wanted)
    beams = {"attention_mask": mask, "max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    cached, whole = (model.generate(SOURCE, use_cache=use, **beams) for use in (True, False))
    assert torch.equal(cached, whole)


@pytest.mark.parametrize("name", WALKING)
def test_cross_attention_that_needs_earlier_queries_keeps_nothing(name: str) -> None:
    model = _model(name=name)
    target = torch.arange(4, 14).reshape(2, 5)
    assert cache_of(model(SOURCE, decoder_input_ids=target, use_cache=True)) is None
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with pytest.raises(ValueError, match="whole target"):
        model(SOURCE, decoder_input_ids=target, **with_cache(model, cache))


@pytest.mark.parametrize("name", WALKING)
def test_cross_attention_that_needs_earlier_queries_is_causal_in_the_target(name: str) -> None:
    model, target = _model(name=name).double(), torch.arange(4, 14).reshape(2, 5)
    whole = model(SOURCE, decoder_input_ids=target).logits
    part = model(SOURCE, decoder_input_ids=target[:, :3]).logits
    torch.testing.assert_close(whole[:, :3], part)


@pytest.mark.parametrize(
    "name", ["dint-transformer", "flowformer", "perturbed-gqa", "hyper-attention", "kdeformer"]
)
def test_cross_attention_whose_queries_all_hang_together_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*see those to come"):
        _model(name=name, heads=4)
