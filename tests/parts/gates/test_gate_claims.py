"""What the papers say of their methods, on small tensors and on the real language model."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from attlas.attach import Part, attach
from attlas.calibration import calibrate, windows
from attlas.hf.caches import cache_of, with_cache
from attlas.parts.evict.balance_kv import BalanceKV
from attlas.parts.evict.q_filters import QFilters
from attlas.parts.evict.streaming_llm import StreamingLLM


class Collect(Part):
    """Queries, keys and values of some layers."""

    def __init__(self, *layers):
        self.layers, self.found = layers, {}

    def observe(self, call):
        if call.layer in self.layers:
            self.found[call.layer] = call.q, call.k, call.v


def collected(model, ids, *layers):
    part = Collect(*layers)
    with torch.no_grad(), attach(model, part):
        model(ids, use_cache=False, logits_to_keep=1)
    return part.found


@pytest.fixture(scope="module")
def filters(smollm2):
    model, tokenizer = smollm2
    return calibrate(model, QFilters(0.5), windows(tokenizer, tokens=512, length=512, seed=1))


def ranks(x):
    order = x.argsort(-1).argsort(-1).float()
    order = order - order.mean(-1, keepdim=True)
    return order / order.norm(dim=-1, keepdim=True)


def test_q_filters_rank_keys_better_than_their_norm(smollm2, filters):
    """Spearman correlation with the attention that keys get from all later queries."""
    model, tokenizer = smollm2
    tokens, layers = 384, range(1, 30, 3)
    ids = windows(tokenizer, tokens=tokens, length=tokens, seed=5)[0]
    later = torch.ones(tokens, tokens).triu(1).bool()
    wins = []
    for number, (q, k, _) in collected(model, ids, *layers).items():
        scores = q @ k.repeat_interleave(3, dim=1).transpose(-1, -2) * 64**-0.5
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        got = weights.sum(2) / torch.arange(tokens, 0, -1)
        got = got.unflatten(1, (3, 3)).mean(2)[0, :, :-64]
        along = -torch.einsum("htd,hd->ht", k[0], filters.tensors[f"{number}.filter"])[:, :-64]
        norm = -k[0].norm(dim=-1)[:, :-64]
        ours, theirs = ((ranks(x) * ranks(got)).sum(-1) for x in (along, norm))
        wins.append(ours > theirs)
    assert torch.stack(wins).float().mean() > 0.8


def test_q_filters_stream_better_than_a_window(smollm2, filters):
    """Perplexity of a text whose cache holds at most 32 tokens between its calls."""
    model, tokenizer = smollm2
    ids = windows(tokenizer, tokens=320, length=320, seed=9)[0]
    losses = []
    for part in (
        QFilters(tokens=32, recent=16, calibration=filters, while_decoding=True),
        StreamingLLM(tokens=32, while_decoding=True),
    ):
        total = []
        with torch.no_grad(), attach(model, part):
            out = model(ids[:, :128], use_cache=True)
            cache, last = cache_of(out), out.logits[:, -1:]
            for start in range(128, 320, 16):
                said = ids[:, start : start + 16]
                logits = model(said, **with_cache(model, cache)).logits
                assert cache.layers[0].dense_slots == 32
                total.append(cross_entropy(torch.cat([last, logits[:, :-1]], 1)[0], said[0]))
                last = logits[:, -1:]
        losses.append(torch.stack(total).mean())
    assert losses[0] < losses[1]


def error(q, k, v, slots, weights):
    """How far attention over weighted slots is from attention over all."""

    def attended(k, v, bias):
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias[..., None, :]
        return scores.softmax(-1) @ v

    full = attended(k, v, torch.zeros(k.shape[:3]))
    k, v = (x.gather(2, slots[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (k, v))
    return ((attended(k, v, weights.log()) - full).norm(dim=-1) / full.norm(dim=-1)).mean()


@pytest.mark.parametrize("keys", ["random", "model"])
@pytest.mark.parametrize("halvings", [1, 2, 3])
def test_balancekv_errs_less_than_uniform_sampling(smollm2, keys, halvings):
    if keys == "random":
        made = [torch.randn(2, 2, n, 32) for n in (48, 512, 512)]
        data = [(made[0], made[1], made[2] + 0.5)]
    else:
        model, tokenizer = smollm2
        ids = windows(tokenizer, tokens=500, length=500, seed=3)[0]
        data = [
            (q[:, :, -48:].unflatten(1, (3, 3)).flatten(2, 3), k[:, :, 32:452], v[:, :, 32:452])
            for q, k, v in collected(model, ids, 2, 20, 28).values()
        ]
    balanced, uniform = 0.0, 0.0
    for q, k, v in data:
        rows, _, tokens, _ = k.shape
        for seed in range(4):
            part = BalanceKV(0.5**halvings, block=64, seed=seed)
            numbers = part._numbers(0, [0] * rows, k)
            kept, weights = part.reduce(k, v, torch.full((rows,), tokens), numbers)
            assert (weights > 0).all()
            balanced += error(q, k, v, kept, weights)
            drawn = torch.rand(k.shape[:3]).argsort(-1)[..., : kept.shape[-1]]
            uniform += error(q, k, v, drawn, torch.ones(drawn.shape))
    assert balanced < uniform


def test_balancekv_walk_keeps_sums_of_the_kernel():
    """Signed sums of exp(q·k) v stay smaller than those of signs drawn without looking."""
    q, k, v = (torch.randn(1, 2, n, 16) * 0.7 for n in (64, 256, 256))
    part = BalanceKV(0.5, block=256, gamma=0.05)
    kernel = (q @ k.transpose(-1, -2) / 4).exp()
    walked, drawn = [], []
    for seed in range(4):
        numbers = torch.rand(1, 2, 1, 256, generator=torch.Generator().manual_seed(seed))
        signs = part._signs(k, v, numbers)
        walked.append((kernel * signs[..., None, :] @ v).norm())
        random = torch.where(torch.rand(1, 2, 256) < 0.5, 1.0, -1.0)
        drawn.append((kernel * random[..., None, :] @ v).norm())
    assert sum(walked) < sum(drawn)
