"""What the row of Spotlight says, sentence by sentence."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from attlas.attach import attach, find_span
from attlas.contract.families import distinct, find
from attlas.contract.parts import continued, prompt, small_llama
from attlas.hf.caches import cache_of, with_cache
from attlas.parts.evict.snapkv import SnapKV
from attlas.parts.record.weights import Weights
from attlas.parts.steer.spotlight import Spotlight
from attlas.tasks.record import share

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results" / "spotlight-cpu.json"
SPAN = (3, 7)


def run(model, ids, *parts, **options):
    """(logits, weights [layers, batch, heads, queries, keys]) with parts attached."""
    with torch.no_grad(), attach(model, *parts, record=["weights"]) as session:
        logits = model(ids, **options).logits
    return logits, session["weights"]


def on(weights, span=SPAN):
    """The share that a span has of each query's attention."""
    return weights[..., span[0] : span[1]].sum(dim=-1)


# ψ ≥ target changes nothing; the new share lies between the old one and the target ------------------


def test_spotlight_leaves_shares_that_reach_the_target():
    model, ids = small_llama(), prompt(24, 2)
    _, plain = run(model, ids)
    lowest = on(plain)[..., SPAN[0] :].min().item()  # of the queries that see the span
    assert lowest > 0
    logits, weights = run(model, ids, Spotlight([SPAN], lowest * 0.999))
    assert torch.equal(weights, plain)
    with torch.no_grad(), attach(model):
        assert torch.equal(logits, model(ids).logits)


def test_spotlight_share_lies_between_the_old_one_and_the_target():
    model, ids = small_llama(), prompt(24, 2)
    _, plain = run(model, ids)
    _, steered = run(model, ids, Spotlight([SPAN], 0.4, layers=[0]))  # its input is the same
    old, new = on(plain[0]), on(steered[0])
    reached = old >= 0.4
    torch.testing.assert_close(new[reached], old[reached])
    seen = ~reached & (old > 0)
    assert seen.sum() > 50
    assert reached.sum() > 5
    assert ((new[seen] > old[seen]) & (new[seen] < 0.4)).all()
    # As the equation has it: the span's weights times target / ψ, and the softmax made whole.
    torch.testing.assert_close(new[seen], 0.4 / (0.4 + 1 - old[seen]))
    assert (new[..., : SPAN[0]] == 0).all()  # queries before the span cannot see it


def test_spotlight_exact_hits_the_target():
    model, ids = small_llama(), prompt(24, 2)
    for layer in (0, 3):
        _, before = run(model, ids)
        _, steered = run(model, ids, Spotlight([SPAN], 0.4, exact=True, layers=[layer]))
        old, new = on(before[layer]), on(steered[layer])
        low = (old > 0) & (old < 0.4)
        assert low.any()
        assert (new[low] - 0.4).abs().max() < 1e-6
        torch.testing.assert_close(new[~low], old[~low])


def test_spotlight_exact_hits_the_target_in_every_layer_and_step():
    model, ids = small_llama(), prompt(24, 2)
    with (
        torch.no_grad(),
        attach(model, Spotlight([SPAN], 0.9, exact=True), record=["weights"]) as s,
    ):
        cache = cache_of(model(ids[:, :20], use_cache=True))
        model(ids[:, 20:21], **with_cache(model, cache))
    share_of_last = on(s["weights"])[..., -1]
    assert share_of_last.shape == (6, 2, 4)
    assert (share_of_last >= 0.9 - 1e-6).all()
    assert (share_of_last - 0.9).abs().median() < 1e-6


@pytest.mark.parametrize("kind", distinct("rotary", "windows", "soft-caps", "sinks"))
def test_spotlight_exact_in_every_family(kind):
    """Of windows what they show of the span; sinks' own share counts among the others'."""
    model, ids = find(kind).model(), prompt(24, 2)
    _, steered = run(model, ids, Spotlight([SPAN], 0.7, exact=True))
    found = on(steered)
    seen = found > 0
    assert (found[seen] >= 0.7 - 1e-5).all()
    assert (found[seen] - 0.7).abs().median() < 1e-5


def test_spotlight_over_layer_has_one_share_for_all_heads():
    model, ids = small_llama(), prompt(24, 2)
    _, plain = run(model, ids)
    _, steered = run(model, ids, Spotlight([SPAN], 0.4, over="layer", layers=[0]))
    psi = on(plain[0]).mean(dim=(1, 2))
    assert (psi < 0.4).any()
    for row in range(2):
        gain = max(1.0, 0.4 / psi[row].item())
        changed = plain[0, row].clone()
        changed[..., SPAN[0] : SPAN[1]] *= gain
        torch.testing.assert_close(steered[0, row], changed / changed.sum(-1, keepdim=True))


# Padding, rows, layers, heads ------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["row", "layer"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_spotlight_padding_moves_no_span(over, side):
    model, ids = small_llama(), prompt(20, 1)
    part = Spotlight([SPAN], 0.4, over=over)
    alone, _ = run(model, ids, part)
    empty = torch.zeros_like(ids[:, :5])
    padded = torch.cat([empty, ids] if side == "left" else [ids, empty], dim=1)
    both = torch.cat([padded, prompt(25, 1, seed=3)])
    valid = torch.ones_like(both)
    valid[0] = (padded[0] != 0).long()
    positions = (valid.cumsum(-1) - 1).clamp(min=0)
    found, _ = run(model, both, part, attention_mask=valid, position_ids=positions)
    torch.testing.assert_close(found[0][valid[0].bool()], alone[0])


def test_spotlight_spans_of_each_row():
    model, ids = small_llama(), prompt(20, 2)
    each = [[(2, 5)], [(6, 8), (11, 12)]]
    for first in (each, each[::-1]):  # one row of one span, one of two
        together, _ = run(model, ids, Spotlight(first, 0.4))
        for row in range(2):
            alone, _ = run(model, ids[row : row + 1], Spotlight(first[row], 0.4))
            torch.testing.assert_close(together[row : row + 1], alone)


@pytest.mark.parametrize("empty", [0, 1])
def test_spotlight_a_row_without_spans_is_left_alone(empty):
    model, ids = small_llama(), prompt(20, 2)
    spans = [[(2, 5)], [(2, 5)]]
    spans[empty] = []
    plain, _ = run(model, ids)
    found, _ = run(model, ids, Spotlight(spans, 0.4))
    torch.testing.assert_close(found[empty], plain[empty], atol=1e-12, rtol=0)
    assert not torch.allclose(found[1 - empty], plain[1 - empty])


def test_spotlight_layers_and_heads_restrict_it():
    model, ids = small_llama(), prompt(24, 2)
    _, plain = run(model, ids)
    for over in ("row", "layer"):
        _, steered = run(model, ids, Spotlight([SPAN], 0.6, over=over, layers=[-2], heads=[1, 2]))
        changed = (steered - plain).abs().amax(dim=(1, 3, 4)) > 0
        assert not changed[:4].any()
        assert changed[4].tolist() == [False, True, True, False]
        _, steered = run(model, ids, Spotlight([SPAN], 0.6, over=over, heads={2: [3]}))
        assert ((steered - plain).abs().amax(dim=(1, 3, 4)) > 0)[2].tolist() == [False] * 3 + [True]
        assert torch.equal(steered[:2], plain[:2])


# Beside other parts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_spotlight_beside_a_cache_policy_and_recorders(exact):
    """What SnapKV keeps of the span gets the share, in every step behind it."""
    model, ids = small_llama(), prompt(24, 2)
    part, policy = Spotlight([SPAN], 0.6, exact=exact), SnapKV(keep=0.5, window=4)
    recorder = Weights()
    with torch.no_grad(), attach(model, policy, part, record=[recorder, "entropy"]) as session:
        cache = cache_of(model(ids, use_cache=True))
        columns = [layer.original_positions() for layer in cache.layers]
        model(ids[:, :1], **with_cache(model, cache))
    assert session["entropy"].isfinite().all()
    weights = session["weights"][..., -1, :]  # [layers, batch, heads, columns]
    assert weights.shape[0] == 6
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    kept = torch.stack([((c >= SPAN[0]) & (c < SPAN[1])).any(-1) for c in columns])
    kept = kept.repeat_interleave(2, dim=2)
    assert kept.any()
    assert not kept.all()
    found = on(weights)
    assert (found[~kept] == 0).all()
    assert (found[kept] > 0).all()
    if exact:
        assert (found[kept] >= 0.6 - 1e-6).all()


def test_spotlight_steps_equal_one_pass():
    model, ids = small_llama(), prompt(24, 2)
    part = Spotlight([SPAN], 0.4)
    with torch.no_grad(), attach(model, part):
        whole = model(ids).logits
        cache, pieces = None, []
        for piece in ids.split([5, 1, 10, 1, 7], dim=1):
            given = {} if cache is None else with_cache(model, cache)
            out = model(piece, use_cache=True, **given) if cache is None else model(piece, **given)
            cache = cache_of(out)
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)


def test_spotlight_share_of_nothing_is_the_model():
    model, ids = small_llama(), prompt(24, 2)
    plain = continued(model, ids)
    with attach(model, Spotlight([SPAN], 0.0)):
        assert torch.equal(continued(model, ids), plain)


# Refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"spans": [(7, 3)]}, "spans"), ({"spans": [(3, 3)]}, "spans"), ({"spans": [(-1, 3)]}, "spans"),
        ({"spans": [[(1, 2)], [(5, 4)]]}, "spans"), ({"spans": [(1, 2), (3, 4, 5)]}, "spans"),
        ({"spans": [5]}, "spans"), ({"share": 1.0}, "share"), ({"share": -0.1}, "share"),
        ({"share": float("nan")}, "share"), ({"over": "head"}, "over"),
        ({"over": "layer", "exact": True}, "exact"),
    ],
)  # fmt: skip
def test_spotlight_refuses_by_name(options, named):
    with pytest.raises((ValueError, TypeCheckError), match=named):  # types are checked in tests
        Spotlight(**{"spans": [SPAN], **options})


@pytest.mark.parametrize(
    ("where", "named"),
    [({"layers": [6]}, "layer 6"), ({"layers": [-7]}, "layer -7"), ({"heads": [4]}, "head 4")],
)
def test_spotlight_refuses_what_the_model_lacks(where, named):
    model = small_llama()
    with pytest.raises(ValueError, match=f"Spotlight names {named}; the model has"):
        attach(model, Spotlight([SPAN], **where)).__enter__()
    with attach(model):  # nothing is left behind
        pass


def test_spotlight_refuses_another_number_of_rows():
    model = small_llama()
    with pytest.raises(ValueError, match="spans has a list for each of 3 rows, the batch has 2"):
        run(model, prompt(20, 2), Spotlight([[SPAN]] * 3))


# On instructions of form SmolLM2 follows them more often than without ---------------------------------


def test_spotlight_makes_smollm2_follow_instructions_more_often():
    """240 prompts, as measured by benchmarks/spotlight.py; intervals are of 95 %."""
    hits, counts = Counter(), Counter()
    for row in json.loads(RESULTS.read_text())["results"]:
        for kind in (row["kind"], "all"):
            condition = row["over"], row["share"], kind
            hits[condition] += row["hits"]
            counts[condition] += row["n"]
    alone = share(hits["alone", 0.0, "all"], counts["alone", 0.0, "all"])
    steered = share(hits["row", 0.3, "all"], counts["row", 0.3, "all"])
    assert alone.n == steered.n >= 100
    assert steered.low > alone.high + 0.05
    ending = share(hits["row", 0.3, "ending"], counts["row", 0.3, "ending"])
    assert (
        ending.low > share(hits["alone", 0.0, "ending"], counts["alone", 0.0, "ending"]).high + 0.1
    )


def test_spotlight_turns_a_word_of_smollm2(smollm2):
    model, tokenizer = smollm2
    instruction = 'The last word of your answer must be "window".'
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{instruction} What do you know about the sea?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    inputs = tokenizer(text, return_tensors="pt")
    first, stop = find_span(tokenizer, inputs.input_ids, instruction)
    assert tokenizer.decode(inputs.input_ids[0, first:stop]) == instruction
    begun = torch.tensor([tokenizer("The sea is a").input_ids])
    ids, said = torch.cat([inputs.input_ids, begun], dim=1), []
    for part in ([], [Spotlight([(first, stop)], 0.3)]):
        with torch.no_grad(), attach(model, *part):
            said.append(tokenizer.decode(model(ids, logits_to_keep=1).logits[0, -1].argmax()))
    assert said == [" vast", " window"]
