"""On the real language model: what holds everything finds again what an eviction forgot."""

import random

import torch

from attlas import attach, prefill
from attlas.hf.caches import with_cache
from attlas.parts.evict.streaming_llm import StreamingLLM
from attlas.parts.select.delta_layer_aware import DeltaLayerAware
from attlas.parts.select.recycled_attention import RecycledAttention
from attlas.tasks.text import passage


def test_a_passage_that_comes_again(smollm2):
    """Read from 96 tokens of about 500 in a step, its second half is surprising to a window alone."""
    model, tokenizer = smollm2
    rng = random.Random(0)
    again, between = passage(rng, 500), passage(rng, 700)
    ids = tokenizer(again + between + again, return_tensors="pt").input_ids
    start = ids.shape[1] - 40
    parts = {
        "window": StreamingLLM(tokens=96, while_decoding=True),
        "recycled": RecycledAttention(tokens=86, stride=10),
        "delta": DeltaLayerAware(tokens=96, recent=32),
    }
    read, loss = prefill(model, ids[:, :start], list(parts.values())), {}
    for name, part in parts.items():
        with torch.no_grad(), attach(model, part):
            cache, logits, loss[name] = read.fork(part), read.logits, 0.0
            for i in range(start, start + 12):
                loss[name] -= float(logits.log_softmax(-1)[0, ids[0, i]]) / 12
                logits = model(ids[:, i : i + 1], **with_cache(model, cache)).logits[:, -1]
    assert loss["recycled"] < loss["window"] - 0.7
    assert loss["delta"] < loss["window"] - 0.7
