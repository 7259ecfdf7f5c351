"""power-attention: d layers reach every distance below 2^d blocks, from O(log n) keys a query."""

import math

import pytest
import torch

import tiny_models
from attlas import masks
from attlas.attach import attach
from attlas.hf.caches import cache_of, with_cache
from attlas.masks.power import power
from attlas.parts.select.power import PowerAttention

TOKENS = 96


def reached(mask: masks.Mask, layers: int) -> torch.Tensor:
    """Which keys can have told a query something behind so many layers; each keeps what it knows."""
    seen = masks.dense(mask, TOKENS, TOKENS)[0, 0].float()
    every = torch.eye(TOKENS)
    for _ in range(layers):
        every = ((every @ seen) + every > 0).float()
    return every > 0


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
def test_power_attention_reaches_every_distance_below_two_to_the_layers(size, layers):
    found = reached(power(size, window_blocks=1, sink_blocks=0), layers)
    block = torch.arange(TOKENS) // size
    away = block[:, None] - block
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    # The unit is a block: all below 2^d blocks, without gaps, the own block's later tokens aside.
    within = (away >= 0) & (away < 2**layers) & causal
    assert found[within].all()
    assert not found[away > layers * 2**6].any()


def test_windows_and_dilated_windows_of_as_many_keys_do_not():
    layers, keys = 5, 1 + 7
    far = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(-layers * keys)
    assert not reached(masks.causal & masks.window(keys), layers)[far].any()
    dilated = reached(masks.causal & masks.dilated(keys, 4), layers)
    assert not dilated[TOKENS - 1, TOKENS - 2]  # a gap: no distance that is no multiple of 4
    ours = reached(power(1, window_blocks=1, sink_blocks=0), layers)
    assert ours[TOKENS - 1, TOKENS - 2**layers :].all()


@pytest.mark.parametrize("tokens", [64, 256, 1024])
def test_keys_per_query_grow_with_the_logarithm(tokens):
    seen = masks.dense(power(1, window_blocks=4, sink_blocks=2), tokens, tokens)[0, 0]
    assert int(seen.sum(-1).max()) <= 4 + 2 + math.log2(tokens)
    blocked = masks.dense(power(8, window_blocks=4, sink_blocks=2), tokens, tokens)[0, 0]
    assert int(blocked.sum(-1).max()) <= 8 * (4 + 2 + math.log2(tokens / 8))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(("q_block", "k_block"), [(1, 1), (4, 2), (5, 7), (16, 16)])
def test_blocks_that_see_something_are_told(size, q_block, k_block):
    mask = power(size, window_blocks=1, sink_blocks=0)
    seen = masks.dense(mask, 60, 60)[0, 0]
    some, every = masks.grid(mask, 60, 60, q_block=q_block, k_block=k_block)
    for i, j in torch.cartesian_prod(torch.arange(some.shape[-2]), torch.arange(some.shape[-1])):
        tile = seen[i * q_block : (i + 1) * q_block, j * k_block : (j + 1) * k_block]
        assert bool(some[0, 0, i, j]) >= bool(tile.any())
        assert bool(every[0, 0, i, j]) <= bool(tile.all())


@pytest.mark.parametrize("padded", [0, 9])
@pytest.mark.parametrize("layers", [(), (1,)])
def test_decoding_follows_the_pattern_too(padded, layers):
    """A prompt and steps of one token are one pass."""
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 44)
    valid = torch.ones_like(ids)
    valid[0, :padded] = 0
    part = PowerAttention(size=2, window_blocks=2, dense_layers=layers)
    with torch.no_grad(), attach(model, part):
        whole = model(ids, attention_mask=valid).logits[:, 30:]
        cache, found = cache_of(model(ids[:, :30], attention_mask=valid[:, :30], use_cache=True)), []
        for at in range(30, 44):
            given = {"attention_mask": valid[:, : at + 1], **with_cache(model, cache)}
            found.append(model(ids[:, at : at + 1], **given).logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-4, atol=1e-4)


def test_a_step_sees_what_a_policy_has_left_of_the_pattern():
    from attlas.parts.evict.streaming_llm import StreamingLLM

    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 44)
    part = PowerAttention(size=2, window_blocks=2)
    with attach(model, StreamingLLM(keep=0.5), part):
        assert tiny_models.greedy(model, ids, 6)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"window_blocks": 0}, "window_blocks"),
        ({"sink_blocks": -1}, "sink_blocks"),
        ({"size": 0}, "size"),
    ],
)
def test_patterns_that_are_none_are_refused(options, told):
    given = {"size": 2, **options}
    with pytest.raises(ValueError, match=told):
        power(given.pop("size"), **given)
