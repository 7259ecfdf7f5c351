"""What the papers claim of each quantiser, on the real language model."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import attlas
from attlas.attach import attach
from attlas.cache.prompt import prefill
from attlas.hf.caches import with_cache
from attlas.tasks.continuation import continuation


@pytest.fixture(scope="module")
def read(smollm2):
    """Mean loss over 96 tokens behind 512, for several parts at once."""
    model, tokenizer = smollm2
    text = continuation(tokenizer, 512, 96, "quantise")
    ids, fed, targets = (torch.tensor(x) for x in (text.context, text.fed, text.targets))

    def losses(*parts):
        context = prefill(model, ids[None], [p for p in parts if p is not None])
        found = []
        for part in parts:
            cache, logits = context.fork(part), []
            with torch.no_grad(), attach(model, *([part] if part else [])):
                for start in range(0, 96, 32):
                    chunk = fed[None, start : start + 32]
                    logits.append(model(chunk, **with_cache(model, cache)).logits[0])
            found.append(float(cross_entropy(torch.cat(logits), targets)))
        return found

    return losses


def test_quantized_cache(read):
    """Four bits cost under 2 % of perplexity here, two more, and groups help two bits."""
    make = attlas.make
    full, four, two, coarse = read(
        None, make("kivi", bits=4), make("kivi", bits=2), make("kivi", bits=2, key_group=64)
    )
    assert four - full < 0.02
    assert four < two < coarse


def test_zipcache_and_qaq(read):
    """Salient tokens in four bits help; QAQ loses less with more bits, and little with four."""
    make = attlas.make
    full, mixed, few, four, two = read(
        None, make("zipcache"), make("zipcache", salient_bits=2, other_bits=2),
        make("qaq", bits=4), make("qaq", bits=2),
    )  # fmt: skip
    assert mixed - full < 0.6 * (few - full)
    assert four - full < 0.08
    assert four < two


def test_akvq_vl(read):
    """Clipping takes most of what two bits lose; pivots, on a text alone, change little."""
    plain = {"pivots": 0, "early_layers": 0, "block": 32}
    full, token, clipped, text, whole = read(
        None,
        attlas.make("akvq-vl", **plain, clip=1.0),
        attlas.make("akvq-vl", **plain),
        attlas.make("akvq-vl", pivots=0, block=32),
        attlas.make("akvq-vl", block=32),
    )
    assert max(clipped, whole) - full < 0.5 * (token - full)
    assert text < clipped
