"""Recorders agree with eager's own attention weights, whatever the blocks, caches and padding."""

import gc

import pytest
import torch

import tiny_models
from attlas.attach import attach, blocks
from attlas.contract.families import distinct
from attlas.hf.caches import cache_of, with_cache
from attlas.parts.evict.key_norm import KeyNorm
from attlas.parts.record.column_sums import ColumnSums
from attlas.parts.record.entropy import Entropy
from attlas.parts.record.mean_distance import MeanDistance
from attlas.parts.record.sink_mass import SinkMass
from attlas.parts.record.top_links import TopLinks
from attlas.parts.record.weights import Weights

ALL = ("weights", "entropy", "sink-mass", "mean-distance", "top-links", "column-sums")


@pytest.fixture(params=[blocks.BLOCK, 500], ids=["whole", "blocks"])
def block(request, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", request.param)


def eager(model, *args, **kwargs):
    """[layers, batch, heads, queries, keys] of the model's eager attention."""
    with torch.no_grad():
        return torch.stack(model(*args, output_attentions=True, **kwargs).attentions)


def agrees(session, weights, valid=None):
    """Every recorder against what its formula says of eager's weights."""
    queries, keys = weights.shape[-2:]
    if valid is not None:
        weights = weights * valid[:, None, :, None]
    first = torch.zeros(weights.shape[1], keys, dtype=torch.long)
    if valid is not None:
        first = first + valid.long().argmax(dim=-1, keepdim=True)
    columns = torch.arange(keys)
    far = (torch.arange(keys - queries, keys)[:, None] - columns).abs()
    expected = {
        "weights": weights,
        "entropy": torch.special.entr(weights).sum(-1),
        "sink-mass": (weights * (columns == first)[None, :, None, None]).sum(-1),
        "mean-distance": (weights * far).sum(-1),
        "column-sums": weights.sum(-2),
    }
    for name, value in expected.items():
        bound = 1e-5 * (1 if name in ("weights", "sink-mass") else keys)  # errors of a sum add up
        torch.testing.assert_close(session[name], value, atol=bound, rtol=1e-5, msg=name)
    links = session["top-links"]
    torch.testing.assert_close(links["weight"], weights.topk(8).values, atol=1e-5, rtol=1e-5)
    at = links["index"].clamp(min=0)
    linked = weights.gather(-1, at) * (links["index"] >= 0)
    torch.testing.assert_close(linked, links["weight"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "kind", distinct("rotary", "full", "windows", "soft-caps", lacking=["sinks"])
)
def test_decoders_equal_eager(kind, block):
    model, ids = tiny_models.decoder(kind, "eager"), tiny_models.prompt()
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    for valid in (None, mask):
        weights = eager(model, ids, attention_mask=valid)
        with torch.no_grad(), attach(model, record=ALL) as session:
            model(ids, attention_mask=valid)
        agrees(session, weights, valid)


def test_sink_logits_equal_eager(block):
    """Eager gives GPT-OSS's weights without the sinks' column, hence summing to less than one."""
    model, ids = tiny_models.decoder("gpt-oss", "eager"), tiny_models.prompt()
    weights = eager(model, ids)
    assert weights.sum(-1).min() < 0.9
    with torch.no_grad(), attach(model, record=ALL) as session:
        model(ids)
    agrees(session, weights)


def test_encoders_equal_eager(block):
    model, ids = tiny_models.bert("eager"), tiny_models.prompt()
    mask = torch.ones_like(ids)
    mask[1, 17:] = 0
    for valid in (None, mask):
        weights = eager(model, ids, attention_mask=valid)
        with torch.no_grad(), attach(model, record=ALL) as session:
            model(ids, attention_mask=valid)
        agrees(session, weights, valid)
    model, pixels = tiny_models.vit("eager"), torch.randn(2, 3, 16, 16)
    weights = eager(model, pixels)
    with torch.no_grad(), attach(model, record=ALL) as session:
        model(pixels)
    agrees(session, weights)


def test_calls_of_one_sequence_append():
    model, ids = tiny_models.decoder("llama", "eager"), tiny_models.prompt(2, 20)
    weights = eager(model, ids)
    with torch.no_grad(), attach(model, record=ALL) as session:
        model(tiny_models.prompt(3, 8, seed=5))  # another sequence, which the next one replaces
        cache = cache_of(model(ids[:, :12]))
        for start, stop in ((12, 17), (17, 18), (18, 19), (19, 20)):
            model(ids[:, start:stop], **with_cache(model, cache))
    agrees(session, weights)


def test_generate_is_recorded():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 12)
    with attach(model, record=["entropy", Entropy(), SinkMass(sinks=3)]) as session:
        tiny_models.greedy(model, ids, 6)
    assert session["entropy"].shape == (4, 2, 4, 17)
    assert torch.equal(session["entropy#2"], session["entropy"])
    assert session["sink-mass"].shape == (4, 2, 4, 17)
    with pytest.raises(KeyError, match="sink-mass"):
        session["colour"]


def test_compressed_caches_are_recorded_in_original_columns():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 24)
    record = [Weights(), ColumnSums(), MeanDistance(), TopLinks(k=3), SinkMass(), Entropy()]
    policy = KeyNorm(0.5, skip_layers=())
    with torch.no_grad(), attach(model, policy, record=record) as session:
        cache = cache_of(model(ids))
        model(tiny_models.prompt(2, 1, seed=4), **with_cache(model, cache))
    weights = session["weights"]
    assert weights.shape == (4, 2, 4, 25, 25)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 2, 4, 25))
    for layer, held in enumerate(cache.layers):
        kept = held.original_positions().repeat_interleave(2, dim=1).long()
        seen = weights[layer, :, :, -1] > 0
        assert torch.equal(seen.nonzero()[:, -1].view(2, 4, -1), kept)
    torch.testing.assert_close(session["column-sums"], weights.sum(-2))
    far = (torch.arange(25)[:, None] - torch.arange(25)).abs()
    torch.testing.assert_close(session["mean-distance"], (weights * far).sum(-1))
    links = session["top-links"]
    torch.testing.assert_close(links["weight"], weights.topk(3).values)


def test_memory_is_linear_in_length():
    """What stays alive after a call, and the blocks during it, do not grow with the square."""
    model = tiny_models.decoder("llama")
    model.config.num_hidden_layers = 1
    sizes = []
    for tokens in (2048, 4096):
        ids = tiny_models.prompt(1, tokens)
        with (
            torch.no_grad(),
            attach(model, record=[Entropy(), ColumnSums(), TopLinks(4)]) as session,
        ):
            largest = 0
            inner = blocks.weight_blocks

            def measured(call, inner=inner, **options):
                nonlocal largest
                for weights, queries, keys in inner(call, **options):
                    largest = max(largest, weights.numel())
                    yield weights, queries, keys

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("attlas.attach.forward.weight_blocks", measured)
                model(ids, use_cache=False)
        assert 0 < largest <= blocks.BLOCK
        gc.collect()
        held = session["entropy"].numel() + session["column-sums"].numel()
        sizes.append(held + sum(x.numel() for x in session["top-links"].values()))
    assert sizes[1] == 2 * sizes[0]


def test_sink_metric():
    recorder, model = ColumnSums(), tiny_models.decoder("llama")
    with torch.no_grad(), attach(model, record=[recorder, "weights"]) as session:
        model(tiny_models.prompt(2, 16))
    alpha = session["weights"].sum(-2) / (16 - torch.arange(16))
    expected = 100 * (alpha > 0.2).float().mean(dim=(0, 1, 2))
    torch.testing.assert_close(recorder.sink_metric(0.2), expected)
    with pytest.raises(ValueError, match="epsilon"):
        recorder.sink_metric(1.5)
