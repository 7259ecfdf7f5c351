"""lrqk-low-rank-attention: sweeps lower the objective, full rank gives logits, misses alone move."""

import random
from itertools import pairwise

import torch

import tiny_models
from attlas.attach import attach
from attlas.attach.call import Call, ForwardPass
from attlas.attach.part import Part
from attlas.cache.factors import coded, factorised
from attlas.cache.prompt import prefill
from attlas.hf.caches import cache_of, with_cache
from attlas.parts.select.lrqk import LRQK
from attlas.storage.layer import LayerState
from attlas.tasks.text import passage


def objective(q, k, m_q, b_q, m_k, b_k):
    a_q, a_k = q @ m_q, k @ m_k
    errors = (q @ k.mT - a_q @ a_k.mT, q - a_q @ b_q, k - a_k @ b_k)
    return sum(e.square().sum() for e in errors)


def test_each_sweep_lowers_the_objective():
    torch.manual_seed(0)
    mix = torch.randn(16, 16).double() * torch.linspace(2, 0.1, 16)
    q, k = (torch.randn(2, 3, 50, 16).double() @ mix for _ in range(2))
    sizes = q.abs().sum(2) + k.abs().sum(2)
    for rank in (1, 4, 9):
        values = [
            objective(q, k, *factorised(q.mT @ q, k.mT @ k, sizes, rank, n)) for n in range(1, 7)
        ]
        assert all(a >= b - 1e-9 * a for a, b in pairwise(values))
        assert values[-1] < 0.999 * values[0]


def test_fewer_tokens_than_the_rank_have_factors():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 3, 16).double()
    found = factorised(q.mT @ q, k.mT @ k, q.abs().sum(2) + k.abs().sum(2), 8, 3)
    assert objective(q, k, *found) < 1e-6
    empty = torch.zeros(1, 1, 16, 16)
    assert all(x.isfinite().all() for x in factorised(empty, empty, empty[..., 0], 8, 3))


def test_codes_in_a_fixed_basis_are_least_squares():
    torch.manual_seed(0)
    k, basis = torch.randn(1, 2, 7, 16).double(), torch.randn(1, 2, 4, 16).double()
    best = torch.linalg.lstsq(basis.mT, k.mT).solution.mT
    torch.testing.assert_close(coded(k, basis), best)


def test_sums_over_pieces_are_those_of_the_whole():
    torch.manual_seed(0)
    q, k, part = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 20, 8), LRQK(keep=0.5, rank=4)
    whole, pieces = LayerState(0, (0,)), LayerState(0, (0,))
    module = torch.nn.Identity()
    part.learn(whole, Call(0, module, q, k, k, 1.0, None, ForwardPass(length=20)))
    for start in (0, 7, 14):
        stop = min(20, start + 7)
        step = ForwardPass(offset=start, length=stop - start)
        keys = k[:, :, :stop]
        part.learn(pieces, Call(0, module, q[:, :, start:stop], keys, keys, 1.0, None, step))
    for name, sums in whole.tensors.items():
        torch.testing.assert_close(pieces.tensors[name], sums)


class Watch(Part):
    """How much of the true top-k each step reads, by layer and step."""

    def __init__(self):
        self.shares = []

    def observe(self, call):
        if call.chosen is None:
            return
        slots, index = call.chosen.slots, call.chosen.index.long()
        body = next(iter(call.cache_layer.bodies.values()))
        keys = body.read()[0][:, :, :slots].repeat_interleave(call.groups, dim=1).to(call.q.dtype)
        top = (call.q @ keys.mT)[:, :, 0].topk(index.shape[-1]).indices
        self.shares.append((top[..., None] == index[..., None, :]).any(-1).float().mean())


def test_full_rank_reads_the_true_top_k():
    model, ids = tiny_models.decoder("llama").double(), tiny_models.prompt(1, 60)
    watch, part = Watch(), LRQK(tokens=9, rank=16, recent=6, block=1)
    with torch.no_grad(), attach(model, watch, part):
        cache = cache_of(model(ids, use_cache=True))
        for token in ids[0, :4].split(1):
            model(token[None], **with_cache(model, cache))
    assert torch.stack(watch.shares).tolist() == [1.0] * 16


def test_codes_follow_their_tokens_into_the_body():
    """Later tokens get codes when they are read; packed, they still have these."""
    model, ids = tiny_models.decoder("llama").double(), tiny_models.prompt(2, 26)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    part = LRQK(tokens=7, rank=16, recent=4, block=3)
    for given in (torch.ones_like(mask), mask):
        with attach(model, part) as session:
            tiny_models.greedy(model, ids, 14, attention_mask=given)
        for layer in session.cache.layers:
            known, body = layer.learned[part.name].tensors, next(iter(layer.bodies.values()))
            keys = body.read()[0].repeat_interleave(2, dim=1)
            there = (body.original_positions(2, 2, ids.device) >= 0).repeat_interleave(2, dim=1)[
                ..., None
            ]
            error = (keys - known["codes"] @ known["b_k"]) * there
            assert error.abs().max() < 1e-6 * keys.abs().max()
            assert known["tail"].shape[2] == layer.dense_slots
            assert (known["codes"] * ~there).abs().max() == 0


def test_lrqk_low_rank_attention_on_a_language_model(smollm2):
    """At half rank most of the true top-k is read, and only what is missing is moved."""
    model, tokenizer = smollm2
    ids = tokenizer(passage(random.Random(5), 4000), return_tensors="pt").input_ids[:, :600]
    part = LRQK(tokens=128, rank=32, recent=64, offload=True, capacity=160)
    prompt, watch = prefill(model, ids, [part]), Watch()
    cache, token = prompt.fork(part), prompt.logits.argmax(-1, keepdim=True)
    with torch.no_grad(), attach(model, watch, part):
        for _ in range(6):
            token = model(token, **with_cache(model, cache)).logits[:, -1].argmax(-1, keepdim=True)
    assert torch.stack(watch.shares).mean() > 0.6
    bodies = [layer.bodies["tiered"] for layer in cache.layers]
    listed = 7 * 9 * 128 * len(bodies)  # six steps, and what the prompt's last query would read
    hits, misses = (sum(getattr(b, n) for b in bodies) for n in ("hits", "misses"))
    assert hits + misses == listed
    assert misses < listed / 2
    assert all(b.nbytes == 9 * 160 * 2 * 64 * 4 for b in bodies)
