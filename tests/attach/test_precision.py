"""Half precision: the same path, statistics in float32, caches in the model's own type."""

import pytest
import torch

import attlas
import tiny_models
from attlas.attach import attach
from attlas.contract.families import distinct
from attlas.hf.caches import cache_of, with_cache

POLICIES = ("streaming-llm", "key-norm-eviction", "snapkv", "expected-attention")


@pytest.mark.parametrize("kind", distinct("soft-caps", "sinks"))
@pytest.mark.parametrize("name", POLICIES)
def test_bfloat16(name, kind):
    options = {"window": 4} if name == "snapkv" else {"skip_layers": ()} if "norm" in name else {}
    if name == "streaming-llm":
        options = {"rerotate": True}
    model, ids = tiny_models.decoder(kind).bfloat16(), tiny_models.prompt()
    policy = attlas.make(name, keep=0.5, **options)
    with torch.no_grad(), attach(model, policy, record=["entropy"]) as session:
        cache = cache_of(model(ids))
        logits = model(tiny_models.prompt(2, 2, seed=3), **with_cache(model, cache)).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert session["entropy"].dtype == torch.float32
    held = [layer for layer in cache.layers if hasattr(layer, "index")]
    assert {layer.keys.dtype for layer in held} == {torch.bfloat16}
    assert {layer.keys.shape[2] for layer in held} == {14}


def test_bfloat16_without_parts():
    model, ids = tiny_models.decoder("llama").bfloat16(), tiny_models.prompt()
    with torch.no_grad():
        expected = model(ids).logits
        with attach(model):
            assert torch.equal(model(ids).logits, expected)
