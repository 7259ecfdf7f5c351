"""What the row of ChunkLLM says, sentence by sentence."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

import attlas
from attlas.adapt.chunkllm import ChunkLLM, chunk_scores, chunks_read, divergence, of_chunks
from attlas.attach import attach
from attlas.contract.parts import prompt, small_llama
from attlas.hf.caches import DynamicCache, StaticCache, with_cache
from real_models import fetched

ENDS = [5, 9, 13, 21, 30, 41, 50, 60]


def injected(model=None, **options) -> tuple[ChunkLLM, object]:
    """With parts whose ends and choices vary."""
    model = small_llama() if model is None else model
    adapter = attlas.make("chunkllm", **{"ends": ENDS, "keep": 2, "width": 8, **options})
    adapter.inject(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for part in adapter.parts.parameters():
            part.add_(torch.randn_like(part))
    return adapter, model


def logits(model, ids: Tensor, **options) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


# The choice ---------------------------------------------------------------------------------------------


def by_definition(q: Tensor, keys: Tensor, marks: Tensor, keep: int) -> Tensor:
    """Which columns each token reads, of one row."""
    seen, chosen, begins, chunks = [], [], 0, []
    for t in range(len(marks)):
        own = begins
        if marks[t]:
            chunks.append(range(begins, t + 1))
            begins = t + 1
            scores = torch.stack([q[t] @ keys[c[-1]] for c in chunks])
            chosen = [chunks[c] for c in scores.topk(min(keep, len(chunks))).indices.tolist()]
        read = {*range(own, t + 1), *(j for c in chosen for j in c)}
        seen.append([j in read for j in range(len(marks))])
    return torch.tensor(seen)


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [13, 1, 1, 20, 5]])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 1.0])
def test_chunkllm_chooses_chunks_at_their_ends_and_keeps_them_between(sizes, share) -> None:
    torch.manual_seed(0)
    q, keys = torch.randn(2, 3, 40, 4).double()
    marks = torch.rand(3, 40) < share
    marks[2] = False
    first, before = 0, None
    for size in sizes:
        end = first + size
        read, before = chunks_read(q[:, first:end], keys[:, :end], marks[:, :end], 2, before)
        for row in range(3):
            wanted = by_definition(q[row, :end], keys[row, :end], marks[row, :end], 2)[first:]
            earlier = torch.ones_like(wanted).tril(first)
            assert torch.equal(read[row] & earlier, wanted)
        first = end


def test_chunkllm_reads_whole_chunks_and_its_own_in_the_model() -> None:
    adapter, model = injected()
    ids = prompt(40, 2)
    with attach(model, record=["weights"]) as session:
        logits(model, ids)
        read = session["weights"] > 0
    assert torch.equal(read[0], read[0] | torch.ones_like(read[0]).tril())  # the first layer reads all
    fewer = [read[layer].sum() / read[0].sum() for layer in range(1, len(read))]
    assert all(share < 0.9 for share in fewer)
    assert not torch.equal(read[1], read[2])  # each layer chooses for itself
    assert adapter.parts.ends.weight.requires_grad


# Keeping all chunks reproduces the model ----------------------------------------------------------------


def test_chunkllm_with_all_chunks_is_the_model() -> None:
    _, model = injected(keep=40)
    assert torch.equal(logits(model, prompt(40, 2)), logits(small_llama(), prompt(40, 2)))
    _, fewer = injected()
    assert not torch.allclose(logits(fewer, prompt(40, 2)), logits(small_llama(), prompt(40, 2)))


def test_chunkllm_with_all_chunks_is_smollm2() -> None:
    model, tokenizer = fetched("smollm2")
    ids = tokenizer("One. Two is more. Three is most. " * 4, return_tensors="pt").input_ids
    plain = logits(model, ids)
    with attlas.make("chunkllm", keep=1000).inject(model):
        torch.testing.assert_close(logits(model, ids), plain, rtol=0, atol=0)


# Decoding, rows, copies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chunkllm_pieces_and_steps_equal_one_pass(kind: str) -> None:
    _, model = injected()
    ids = prompt(40, 2)
    whole = logits(model, ids)
    cache = (
        DynamicCache(config=model.config) if kind == "dynamic"
        else StaticCache(config=model.config, max_cache_len=48)
    )  # fmt: skip
    parts = [logits(model, p, **with_cache(model, cache)) for p in ids.split([11, 1, 1, 20, 7], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-9)


def test_chunkllm_beams_take_their_chunks_along() -> None:
    _, model = injected()
    options = {"max_new_tokens": 12, "num_beams": 4, "do_sample": False, "num_return_sequences": 3}
    ids = prompt(20, 2)
    written = model.generate(ids, **options)
    assert torch.equal(written, model.generate(ids, use_cache=False, **options))


def test_chunkllm_caches_are_copied_reset_and_not_cut() -> None:
    _, model = injected()
    ids = prompt(30)
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :20], **with_cache(model, cache))
    twin = deepcopy(cache)
    wanted = logits(model, ids)[:, 20:]
    for held in (cache, twin):
        found = logits(model, ids[:, 20:], **with_cache(model, held))
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="taken back"):
        cache.crop(-1)
    other = DynamicCache(config=model.config)
    logits(small_llama(), ids[:, :20], **with_cache(model, other))
    with pytest.raises(ValueError, match="read without the adapter"):
        logits(model, ids[:, 20:], **with_cache(model, other))


def test_chunkllm_padding_on_the_left_changes_nothing() -> None:
    _, model = injected()
    ids = prompt(30, 2)
    ids[0, :9] = 0
    found = logits(model, ids, attention_mask=(ids != 0).long(),
                   position_ids=((ids != 0).cumsum(-1) - 1).clamp(min=0))  # fmt: skip
    torch.testing.assert_close(found[:1, 9:], logits(model, ids[:1, 9:]), rtol=1e-9, atol=1e-9)


# Training -----------------------------------------------------------------------------------------------


def test_chunkllm_loss_is_the_divergence_from_the_models_attention_to_chunks() -> None:
    adapter, model = injected()
    ids = prompt(30, 2)
    with attach(small_llama(), record=["weights"]) as session:
        logits(session.model, ids)
        weights = session["weights"].mean(2)
    states, found = adapter.taught(model, ids)
    torch.testing.assert_close(found, weights)
    marks = adapter.labels(ids)
    assert marks.sum(-1).min() > 2
    q, k = adapter.parts(1, states[1])
    each = []
    for row in range(2):
        at = marks[row].nonzero()[:, 0].tolist()
        for t in range(30):
            over = [e for e in at if e <= t]
            if len(over) > 1:
                bounds = [0, *(e + 1 for e in at)]
                mass = torch.stack([weights[1, row, t, a : e + 1].sum() for a, e in zip(bounds, over)])  # noqa: B905
                told = torch.stack([q[row, t] @ k[row, e] for e in over]).log_softmax(-1)
                target = mass / mass.sum()
                each.append((target * (target.log() - told)).sum())
    ours = divergence(of_chunks(weights[1], marks), chunk_scores(q, k, marks), marks)
    torch.testing.assert_close(ours.double(), torch.stack(each).mean(), rtol=1e-5, atol=1e-6)


def test_chunkllm_training_finds_ends_and_the_models_heavy_chunks() -> None:
    """A reduced form of what benchmarks/claims_distilled.py measures with SmolLM2."""
    model = small_llama(torch.float32)
    adapter = attlas.make("chunkllm", ends=[5, 9, 13], keep=2, width=16)
    adapter.inject(model)
    held_out, losses = torch.randint(1, 64, (8, 48), generator=torch.Generator().manual_seed(9)), []
    before = adapter.recall(model, held_out)
    optimizer = torch.optim.AdamW(adapter.trainable().values(), lr=2e-2)
    torch.manual_seed(0)
    for step in range(60):
        loss = adapter.loss(model, torch.randint(1, 64, (8, 48)), step / 60)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert adapter.recall(model, held_out) > before + 0.1


def test_chunkllm_refuses_training_without_ends() -> None:
    adapter, model = injected(ends=[])
    with pytest.raises(ValueError, match="ends"):
        adapter.loss(model, prompt(8), 0.0)
    for name, value in {"keep": 0, "width": 0, "threshold": 1.0}.items():
        with pytest.raises(ValueError, match=name):
            attlas.make("chunkllm", **{name: value})
