"""Parts of the user's own, alone and together, each against the same change made by hand."""

import torch

import tiny_models
from attlas.attach import Part, attach
from attlas.contract.families import distinct
from attlas.hf.caches import cache_of, with_cache
from attlas.parts.evict.snapkv import SnapKV


class Nearer(Part):
    """A score bias by distance, written as FlexAttention writes it."""

    def score_mod(self, call):
        return lambda score, b, h, q, k: score - 0.3 * (h + 1) * (q - k)


class Odd(Part):
    """Hides tokens in even columns from head 0, but for the query's own."""

    def mask(self, call):
        keys = torch.arange(call.k.shape[2])
        shown = (keys % 2 == 1) | (keys == call.queries[:, None])
        heads = torch.arange(call.q.shape[1])[:, None, None]
        return (shown | (heads > 0))[None]


class Louder(Part):
    """Doubles head 1 of layer 2."""

    def output(self, call, heads):
        if call.layer != 2:
            return heads
        heads = heads.clone()
        heads[:, :, 1] *= 2
        return heads


def by_hand(call, parts):
    """The heads of a causal call with all three changes, in plain words."""
    k, v = (x.repeat_interleave(call.groups, dim=1) for x in (call.k, call.v))
    scores = call.q @ k.transpose(-1, -2) * call.scaling
    h = torch.arange(scores.shape[1])[:, None, None]
    q, j = call.queries[:, None], torch.arange(k.shape[2])
    if "nearer" in parts:
        scores = scores - 0.3 * (h + 1) * (q - j)
    hidden = j > q
    if "odd" in parts:
        hidden = hidden | ((h == 0) & (j % 2 == 0) & (j != q))
    heads = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    if "louder" in parts and call.layer == 2:
        heads[:, 1] *= 2
    return heads.transpose(1, 2)


class Check(Part):
    """Stands last and compares what went before with the same by hand."""

    def __init__(self, *parts):
        self.parts, self.calls = parts, 0

    def output(self, call, heads):
        torch.testing.assert_close(heads, by_hand(call, self.parts), atol=1e-5, rtol=1e-4)
        self.calls += 1
        return heads


def test_each_stage_and_all_together():
    ids = tiny_models.prompt(2, 12)
    every = {"nearer": Nearer(), "odd": Odd(), "louder": Louder()}
    for kind in distinct("rotary"):
        model = tiny_models.decoder(kind)
        for names in (("nearer",), ("odd",), ("louder",), tuple(every)):
            check = Check(*names)
            with torch.no_grad(), attach(model, *(every[n] for n in names), check):
                cache = cache_of(model(ids))
                model(tiny_models.prompt(2, 3, seed=2), **with_cache(model, cache))
                model(tiny_models.prompt(2, 1, seed=3), **with_cache(model, cache))
            assert check.calls == 12


def test_a_policy_a_bias_a_mask_and_recorders_together():
    """Through a compressed cache a bias still speaks of the original positions."""
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 24)
    seen = []

    class Distances(Part):
        def score_mod(self, call):
            def mod(score, b, h, q, k):
                seen.append((q, k))
                return score - 0.01 * (q - k)

            return mod

    policy = SnapKV(0.5, window=3)
    with torch.no_grad(), attach(model, policy, Distances(), record=["weights"]) as session:
        cache = cache_of(model(ids))
        logits = model(tiny_models.prompt(2, 2, seed=4), **with_cache(model, cache)).logits
    weights = session["weights"]
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert max(int(q.max()) for q, _ in seen) == 25
    assert max(int(k.max()) for _, k in seen) == 25
    assert logits.isfinite().all()


def test_soft_caps_come_before_parts():
    """With a soft cap in force, an added bias is not capped."""
    model, ids = tiny_models.decoder("gemma2"), tiny_models.prompt(1, 12)

    class Only(Part):
        """Pushes every key but the first far away."""

        def score_mod(self, call):
            return lambda score, b, h, q, k: score - 100.0 * (k > 0)

    with torch.no_grad(), attach(model, Only(), record=["sink-mass"]) as session:
        model(ids)
    assert session["sink-mass"][:, :, :, :8].min() > 0.999  # later, windows hide the first token


def test_phases_and_positions():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    seen = []

    class Look(Part):
        def observe(self, call):
            if call.layer == 3:
                seen.append((call.phase, call.positions.tolist(), call.cache_layer.keys.shape[2]))

    with attach(model, Look()):
        tiny_models.greedy(model, ids, 2, attention_mask=mask)
    assert [phase for phase, _, _ in seen] == ["prefill", "decode"]
    assert seen[0][1][1] == list(range(9))
    assert seen[0][1][0][4:] == list(range(5))
    assert seen[1][1:] == ([[5], [9]], 10)
