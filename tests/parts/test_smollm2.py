"""On the real language model."""

import pytest
import torch

import attlas
from attlas.attach import attach
from attlas.cache.prompt import prefill
from attlas.hf.caches import with_cache


@pytest.fixture(scope="module")
def ids(smollm2):
    _, tokenizer = smollm2
    text = "The keeper counted the lights of the fishing boats and drew a circle for each. " * 16
    return tokenizer(text, return_tensors="pt").input_ids


def test_bare_attach_is_the_model(smollm2, ids):
    model, _ = smollm2
    with torch.no_grad():
        expected = model(ids, logits_to_keep=1).logits
        with attach(model):
            assert torch.equal(model(ids, logits_to_keep=1).logits, expected)


@pytest.mark.parametrize("name", ["streaming-llm", "key-norm-eviction", "snapkv", "expected-attention"])
def test_budgets(smollm2, ids, name):
    model, _ = smollm2
    pair = 30 * 3 * 2 * 64 * 4
    policies = {
        int(ids.shape[1] * 0.4) * pair: attlas.make(name, keep=0.4),
        100 * pair: attlas.make(name, tokens=100),
        5_000_000: attlas.make(name, bytes=5_000_000),
    }
    prompt = prefill(model, ids, list(policies.values()), chunk=100)
    for promise, policy in policies.items():
        with torch.no_grad(), attach(model, policy) as session:
            model(ids[:, :1], **with_cache(model, prompt.fork(policy)))
        assert session.kv_bytes - pair == pytest.approx(promise, rel=0.02)
