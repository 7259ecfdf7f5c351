"""Cache policies: what they keep, what they hold, and that padding, chunks and calls do not matter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import tiny_models
from attlas.attach import Part, attach
from attlas.cache.policy import CachePolicy, best_slots
from attlas.cache.prompt import prefill
from attlas.contract.families import distinct, find
from attlas.hf.caches import cache_of, with_cache
from attlas.parts.evict.ada_kv import AdaKV
from attlas.parts.evict.expected_attention import ExpectedAttention
from attlas.parts.evict.key_norm import KeyNorm
from attlas.parts.evict.observed_attention import ObservedAttention
from attlas.parts.evict.pyramid_kv import PyramidKV
from attlas.parts.evict.snapkv import SnapKV
from attlas.parts.evict.streaming_llm import StreamingLLM
from attlas.parts.evict.tova import TOVA

POLICIES = {
    "window": lambda **kw: StreamingLLM(sinks=2, **kw),
    "window-rerotated": lambda **kw: StreamingLLM(sinks=2, rerotate=True, **kw),
    "knorm": lambda **kw: KeyNorm(skip_layers=(), **kw),
    "knorm-skipping": lambda **kw: KeyNorm(skip_layers=(1,), **kw),
    "snapkv": lambda **kw: SnapKV(window=3, **kw),
    "snapkv-max": lambda **kw: SnapKV(window=3, kernel=3, pooling="max", **kw),
    "expected": lambda **kw: ExpectedAttention(sinks=2, n_future=16, **kw),
    "expected-mean": lambda **kw: ExpectedAttention(
        sinks=2, n_future=16, use_covariance=False, use_vnorm=False, **kw
    ),
    "tova": lambda **kw: TOVA(**kw),
    "observed": lambda **kw: ObservedAttention(**kw),
    "pyramid": lambda **kw: PyramidKV(scorer_options={"window": 3}, **kw),
    "adakv": lambda **kw: AdaKV(scorer_options={"window": 3}, **kw),
}
#: Combinations of what stands above, tested where they might differ.
MORE = {
    **POLICIES,
    "h2o": lambda **kw: ObservedAttention(recent=3, divide=False, **kw),
    "adakv-pyramid": lambda **kw: AdaKV(
        scorer="pyramid-kv", scorer_options={"scorer_options": {"window": 3}}, **kw
    ),
}
every_policy = pytest.mark.parametrize("policy", POLICIES)
#: Soft caps change weights alone, see test_dropping_equals_hiding.
KINDS = distinct(
    "rotary",
    "partial-rotary",
    "key-norm",
    "windows",
    "sinks",
    having=["full"],
    lacking=["soft-caps", "states"],  # of hybrids see tests/attach/test_cache_kinds.py
)


def logits_after(model, policy, ids, padding="none", length=None, steps=4, chunked=False):
    """Logits of fixed later tokens, with the context in one row of a padded batch of two."""
    length = length or ids.shape[1]
    later = tiny_models.prompt(1, steps, seed=9)
    if padding == "none":
        mask = torch.ones_like(ids)
    else:
        gap = torch.full((1, length - ids.shape[1]), 5)
        row = [gap, ids] if padding == "left" else [ids, gap]
        valid = [torch.zeros_like(gap), torch.ones_like(ids)]
        mask = torch.cat(valid if padding == "left" else valid[::-1], dim=1)
        other = tiny_models.prompt(1, length, seed=4)
        ids = torch.cat([torch.cat(row, dim=1), other])
        mask = torch.cat([mask, torch.ones_like(other)])
    found = []
    with torch.no_grad(), attach(model, policy, chunked=chunked):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=model.config)
        size = 5 if chunked else ids.shape[1]
        for start in range(0, ids.shape[1], size):
            part = slice(start, start + size)
            model(
                ids[:, part], **with_cache(model, cache), position_ids=positions[:, part],
                attention_mask=mask[:, : part.stop],
            )  # fmt: skip
        for token in later[0]:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            out = model(
                token.expand(len(mask), 1), **with_cache(model, cache), attention_mask=mask,
                position_ids=mask.sum(-1, keepdim=True) - 1,
            )  # fmt: skip
            found.append(out.logits[0, -1])
    return torch.stack(found), cache


def original_positions(layer):
    """Original positions of every slot of a layer, dropped from or not."""
    if layer.original_positions() is not None:
        return layer.original_positions()
    return torch.arange(layer.keys.shape[2]).expand(layer.keys.shape[:3])


@pytest.mark.parametrize("kind", KINDS)
@every_policy
def test_padding_does_not_count(kind, policy):
    model, ids = tiny_models.decoder(kind), tiny_models.prompt(1, 22)
    make = POLICIES[policy]
    alone, _ = logits_after(model, make(keep=0.6), ids)
    # Padding on the right stands inside the model's own windows and states, attlas or not.
    for side in ("left",) if {"windows", "states"} & find(kind).traits else ("left", "right"):
        padded, cache = logits_after(model, make(keep=0.6), ids, side, length=31)
        torch.testing.assert_close(padded, alone, atol=2e-4, rtol=1e-3)
        assert any(
            getattr(layer, "ragged", False) or getattr(layer, "bodies", {})
            for layer in cache.layers
        )


@every_policy
def test_left_padding_gives_the_same_tokens(policy):
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    make = POLICIES[policy]
    for beams in (1, 3) if policy in ("snapkv", "expected", "adakv") else (1,):
        with attach(model, make(keep=0.6)):
            both = tiny_models.greedy(model, ids, 6, attention_mask=mask, num_beams=beams)
            first = tiny_models.greedy(model, ids[:1, 9:], 6, num_beams=beams)
            second = tiny_models.greedy(model, ids[1:], 6, num_beams=beams)
        assert both == first + second


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@every_policy
def test_chunked_prefill_equals_at_once(policy, padding):
    model, ids = tiny_models.decoder("qwen3"), tiny_models.prompt(1, 22)
    make = POLICIES[policy]
    whole, one = logits_after(model, make(keep=0.6), ids, padding, length=33)
    parts, two = logits_after(model, make(keep=0.6), ids, padding, length=33, chunked=True)
    for first, second in zip(one.layers, two.layers, strict=True):
        assert first.keys.shape == second.keys.shape
        assert torch.equal(original_positions(first), original_positions(second))
    torch.testing.assert_close(parts, whole, atol=2e-4, rtol=1e-3)


def test_chunked_generate():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 23)
    with attach(model, SnapKV(0.5, window=3)):
        expected = tiny_models.greedy(model, ids)
    with attach(model, SnapKV(0.5, window=3), chunked=True) as session:
        assert tiny_models.greedy(model, ids, prefill_chunk_size=7) == expected
        assert session.cache.layers[0].keys.shape[2] == 11 + 9


class Hide(Part):
    """Hides from a whole cache what another session's cache has dropped."""

    def __init__(self, layers, context):
        self.layers, self.context = layers, context

    def mask(self, call):
        layer = self.layers[call.layer]
        if (
            not call.forward_pass.offset
            or not hasattr(layer, "original_positions")
            or layer.original_positions() is None
        ):
            return None
        columns = layer.original_positions()
        shown = torch.zeros(*columns.shape[:2], call.k.shape[2], dtype=torch.bool)
        shown[..., self.context :] = True
        for batch, head in ((b, h) for b in range(len(columns)) for h in range(columns.shape[1])):
            kept = columns[batch, head]
            shown[batch, head, kept[kept >= 0].long()] = True
        return shown.repeat_interleave(call.groups, dim=1)[:, :, None]


@pytest.mark.parametrize(
    "kind", distinct("windows", "soft-caps", "sinks", having=["full", "rotary"])
)
@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "window-rerotated"])
def test_dropping_equals_hiding(kind, policy):
    """The compressed cache attends as a whole one in which the dropped keys are masked."""
    model, ids = tiny_models.decoder(kind), tiny_models.prompt(2, 24)
    question = tiny_models.prompt(2, 3, seed=5)
    with torch.no_grad():
        with attach(model, POLICIES[policy](keep=0.6)):
            cache = cache_of(model(ids))
            dropped = model(question, **with_cache(model, cache)).logits
        with attach(model, Hide(cache.layers, 24)):
            whole = cache_of(model(ids))
            hidden = model(question, **with_cache(model, whole)).logits
    torch.testing.assert_close(dropped, hidden, atol=2e-4, rtol=1e-4)


@every_policy
def test_prompt_is_exact_and_positions_go_on(policy):
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt()
    later = tiny_models.prompt(2, 3, seed=5)
    with torch.no_grad():
        plain = model(ids).logits
        with attach(model, POLICIES[policy](keep=0.6)) as session:
            first = model(ids)
            torch.testing.assert_close(first.logits, plain)
            counted = model(later, **with_cache(model, cache_of(first))).logits
            again = cache_of(model(ids))
            positions = torch.arange(24, 27)[None]
            told = model(later, **with_cache(model, again), position_ids=positions).logits
            assert session.cache.get_seq_length() == 27
    assert torch.equal(counted, told)


@every_policy
def test_a_budget_of_everything_changes_nothing(policy):
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt()
    expected = tiny_models.greedy(model, ids)
    for budget in ({"keep": 1.0}, {"tokens": 24}, {"bytes": 10**9}):
        with attach(model, POLICIES[policy](**budget)):
            assert tiny_models.greedy(model, ids) == expected


def wide(kind="llama"):
    """Heads of realistic width, beside which a slot's index weighs little."""
    torch.manual_seed(0)
    config = find(kind).config(hidden_size=256, head_dim=64)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", distinct("windows", having=["full"]))
@pytest.mark.parametrize("policy", ["window-rerotated", "knorm-skipping", "snapkv", "expected",
                                    "pyramid", "adakv", "adakv-pyramid"])  # fmt: skip
def test_bytes_held_equal_the_promise(policy, kind):
    rows = 2
    model, ids = wide(kind), tiny_models.prompt(rows, 200)
    make = MORE[policy]
    pair = 2 * 64 * 2 * 4 * rows  # one token's key and value in one layer
    windows = sum(layer.is_sliding for layer in DynamicCache(config=model.config).layers)
    full = 4 - windows
    beside = windows * 7 * pair
    promises = {
        ("keep", 0.6): full * 120 * pair + beside,
        ("tokens", 150): full * 150 * pair + beside,
        ("bytes", 150 * 4 * pair): 150 * 4 * pair,
    }
    for (name, value), promise in promises.items():
        if windows and name == "bytes":
            value = promise = 150 * full * pair
        with torch.no_grad(), attach(model, make(**{name: value})) as session:
            model(ids)
            assert session.kv_bytes == pytest.approx(promise, rel=0.02)


@pytest.mark.parametrize("policy", ["window", "window-rerotated", "knorm", "expected", "tova",
                                    "observed", "h2o"])  # fmt: skip
def test_while_decoding_the_budget_holds(policy):
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 24)
    with attach(model, MORE[policy](tokens=12, while_decoding=True)) as session:
        tiny_models.greedy(model, ids)
        assert {layer.keys.shape[2] for layer in session.cache.layers} == {12}
        columns = session.cache.layers[-1].original_positions()
        assert (columns.diff(dim=-1) > 0).all()
        assert columns.max() == 24 + 9 - 1 or policy in ("knorm", "expected", "observed")


def test_while_decoding_equals_brute_force():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(1, 24)
    with torch.no_grad(), attach(model, KeyNorm(tokens=10, skip_layers=(), while_decoding=True)):
        cache = cache_of(model(ids))
        for token in tiny_models.prompt(1, 4, seed=3)[0]:
            before = cache.layers[0].keys
            model(token[None, None], **with_cache(model, cache))
            after = cache.layers[0].keys
            norms = after.norm(dim=-1)
            assert norms.max(-1).values.le(before.norm(dim=-1).max(-1).values + 1e-6).all()
    with torch.no_grad(), attach(model):
        keys = cache_of(model(ids)).layers[0].keys
    with torch.no_grad(), attach(model, KeyNorm(tokens=10, skip_layers=())):
        layer = cache_of(model(ids)).layers[0]
    best = keys.norm(dim=-1).topk(10, largest=False).indices.sort(dim=-1).values
    assert torch.equal(layer.index.long(), best)


def test_rerotated_sinks_stand_beside_the_window():
    """With keys placed side by side, the answer is that of a text without the middle."""
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(1, 24)
    model.config.num_hidden_layers = 1  # deeper layers' values still know the middle
    token = torch.tensor([[7]])
    short = torch.cat([ids[:, :2], ids[:, -8:]], dim=1)
    for decoding in (False, True):
        policy = StreamingLLM(tokens=10, sinks=2, rerotate=True, while_decoding=decoding)
        with torch.no_grad(), attach(model, policy):
            cache = cache_of(model(ids))
            out = model(token, **with_cache(model, cache)).logits[0, -1]
        expected = model(torch.cat([short, token], dim=1)).logits[0, -1]
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad(), attach(model, policy):
        out = model(torch.tensor([[8]]), **with_cache(model, cache)).logits[0, -1]
    text = torch.cat([short[:, :2], short[:, 3:], token, torch.tensor([[8]])], dim=1)
    torch.testing.assert_close(out, model(text).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_forks_share_one_prefill():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(1, 24)
    question = tiny_models.prompt(1, 3, seed=5)
    policies = [make(keep=0.6) for make in POLICIES.values()]
    prompt = prefill(model, ids, policies, chunk=7)
    with torch.no_grad():
        assert torch.allclose(prompt.logits, model(ids).logits[:, -1], atol=1e-4)
        whole = model(torch.cat([ids, question], dim=1)).logits[:, -3:]
        for _ in range(2):  # forks disturb neither the prompt nor one another
            with attach(model):
                cache = prompt.fork()
                out = model(question, **with_cache(model, cache)).logits
                torch.testing.assert_close(out, whole, atol=1e-4, rtol=1e-4)
            for name, policy in zip(POLICIES, policies, strict=True):
                with attach(model, policy):
                    forked = model(question, **with_cache(model, prompt.fork(policy))).logits
                    alone = cache_of(model(ids))
                    expected = model(question, **with_cache(model, alone)).logits
                torch.testing.assert_close(forked, expected, atol=1e-4, rtol=1e-4, msg=name)
    assert prompt.cache.get_seq_length() == prompt.tokens == 24


def test_an_extended_prompt_is_one_read_at_once():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(1, 24)
    policies = [make(keep=0.6) for make in POLICIES.values()]
    context = prefill(model, ids[:, :20], policies)
    extended, whole = context.extend(model, ids[:, 20:]), prefill(model, ids, policies)
    torch.testing.assert_close(extended.logits, whole.logits, atol=1e-4, rtol=1e-4)
    for policy in policies:
        ours, theirs = extended.fork(policy), whole.fork(policy)
        for layer, other in zip(ours.layers, theirs.layers, strict=True):
            assert torch.equal(original_positions(layer), original_positions(other))
            held = [each.read()[0][original_positions(each) >= 0] for each in (layer, other)]
            torch.testing.assert_close(*held, atol=1e-4, rtol=1e-4)
    assert context.tokens == context.cache.get_seq_length() == 20


def test_forks_of_a_model_with_sliding_windows():
    model, ids = tiny_models.decoder("gemma3"), tiny_models.prompt(2, 24)
    question = tiny_models.prompt(2, 3, seed=5)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    policy = ExpectedAttention(0.5)
    prompt = prefill(model, ids, [policy], attention_mask=mask, chunk=10)
    longer = torch.cat([mask, torch.ones_like(question)], dim=1)
    positions = longer.cumsum(-1)[:, -3:] - 1
    for used in (policy, None):
        with torch.no_grad(), attach(model, *([used] if used else [])):
            at_once = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(0))
            logits = [
                model(
                    question,
                    **with_cache(model, cache),
                    attention_mask=longer,
                    position_ids=positions,
                ).logits
                for cache in (prompt.fork(used), cache_of(at_once))
            ]
        torch.testing.assert_close(*logits, atol=2e-4, rtol=1e-3)


class Last(CachePolicy):
    """A policy of somebody else's, in three lines."""

    def scores(self, state, slots):
        return slots.rank.float()


def test_a_policy_in_three_lines():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt()
    with attach(model, Last(keep=0.25)):
        layer = cache_of(model(ids)).layers[0]
    assert torch.equal(layer.original_positions(), torch.arange(18, 24).expand(2, 2, -1).int())


@settings(max_examples=40, deadline=None)
@given(
    slots=st.integers(1, 12), kinds=st.integers(1, 4), seed=st.integers(0, 1000),
    pads=st.tuples(st.integers(0, 4), st.integers(0, 4)),
)  # fmt: skip
def test_of_equal_scores_the_earlier_slot_stays_beside_any_other_row(
    slots: int, kinds: int, seed: int, pads: tuple[int, int]
) -> None:
    torch.manual_seed(seed)
    width = slots + max(pads)
    scores = torch.randint(0, kinds, (2, 3, width)).float()
    valid = torch.stack([torch.arange(width) >= pad for pad in pads])[:, None].expand(2, 3, width)
    budget = torch.tensor([max(1, slots // 2), slots])
    chosen, filled = best_slots(scores, valid, budget)
    for row, pad in enumerate(pads):
        for head in range(3):
            there = range(pad, width)
            order = sorted(there, key=lambda slot: (-float(scores[row, head, slot]), slot))
            best = sorted(order[: int(budget[row])])
            assert chosen[row, head][filled[row, head]].tolist() == best
            assert filled[row, head].sum() == len(best)
