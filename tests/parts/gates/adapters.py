"""Adapters of calibrated filters, the balanced walk and gated heads to published numbers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from attlas import masks
from attlas.attach import attach
from attlas.attach.call import Call, Step
from attlas.cache.duo_gates import mixture, streaming
from attlas.cache.policy import best
from attlas.calibration import Calibration
from attlas.contract.cases import Case, Check, adapter
from attlas.hf.caches import cache_of, with_cache
from attlas.parts.evict.balance_kv import BalanceKV
from attlas.parts.evict.duo_attention import DuoAttention
from attlas.parts.evict.q_filters import QFilters
from attlas.storage.files import fingerprint
from attlas.storage.layer import LayerState, StoredLayer


@cache
def smollm2() -> Any:
    from attlas.models.load import load

    return load("smollm2")


def a_call(q: Tensor, k: Tensor, v: Tensor, layer: int = 0) -> Call:
    step = Step(length=q.shape[2])
    return Call(
        layer, nn.Identity(), q, k, v, q.shape[-1] ** -0.5, None, step, is_causal=True
    )  # fmt: skip


def known(model: dict[str, Any], key: str, tensors: dict[str, Tensor]) -> Calibration:
    return Calibration(key, model, tensors)


@adapter("q-filters", mechanism="q-filters")
def q_filters(case: Case) -> Iterator[Check]:
    """Filters of given queries, then scores and kept keys; the window is kept besides."""
    config, keys = case.config, case.inputs["k"]
    window, budget = config["window_length"], config["max_length"]
    policy = QFilters(tokens=budget, window=window)
    calibrator = policy.calibrator()
    queries = case.inputs["queries"][None]
    empty = torch.zeros(1, config["kv_heads"], queries.shape[2], queries.shape[3])
    calibrator.observe(a_call(queries, empty, empty))
    filters = calibrator.tensors()
    yield case.compare("out.filters", filters["0.filter"])
    policy.found = known({}, "q-filters", filters)
    state = LayerState(0, (0,))
    layer = StoredLayer({policy.name: state})
    layer.update(keys, keys)
    slots = policy.slots(layer, state, layer.rows())
    scores = policy.scores(state, slots)
    yield case.compare("out.scores", scores[..., : keys.shape[2] - window])
    kept, _ = best(scores, slots.valid, slots.budget)
    yield case.compare("out.kept_prefix_indices", kept[..., : budget - window])


@adapter("model-qfilter", mechanism="q-filters")
def q_filters_on_model(case: Case) -> Iterator[Check]:
    """The given filters on the real language model."""
    model = smollm2()
    filters = {f"{i}.filter": f for i, f in enumerate(case.params["q_filters"])}
    policy = QFilters(
        1.0 - case.config["compression_ratio"], window=0,
        calibration=known(fingerprint(model), "q-filters", filters),
    )  # fmt: skip
    scores: dict[int, Tensor] = {}
    score = policy.scores

    def spy(state: LayerState, slots: Any) -> Tensor:
        scores[state.layer] = score(state, slots)
        return scores[state.layer]

    policy.scores = spy  # type: ignore[method-assign]
    cache, first, generated = answered(case, policy)
    for number in case.config["layers_saved"]:
        theirs = case.outs[f"scores.layer{number}"]
        yield case.compare(f"out.scores.layer{number}", scores[number][0])
        name = f"out.kept.layer{number}"
        columns, published = cache[number]["columns"][0], case.outs[f"kept.layer{number}"]
        yield kept_otherwise(case, name, columns, published, theirs)
    yield case.compare("out.kept_per_layer", torch.tensor([layer["held"] for layer in cache]))
    yield from said(case, first, generated)


@adapter("balancekv", mechanism="balancekv")
def balancekv(case: Case) -> Iterator[Check]:
    """Kept indices, heaviest first, and weights of the walk for given random numbers."""
    config = case.config
    part = BalanceKV(
        0.5 ** config["iterations"],
        block=config["block_size"],
        gamma=config["gamma"],
        temperature=config["temp"],
        beta=config["beta"],
        use_values=config.get("with_values", True),
    )
    k = case.inputs["k"]
    v = case.inputs.get("v", k)
    count = torch.full((k.shape[0],), k.shape[2])
    kept, weights = part.reduce(k, v, count, lambda t, blocks: case.inputs[f"rand{t}"])
    yield case.compare("out.indices", kept)
    yield case.compare("out.weights", weights)


def answered(case: Case, part: Any) -> tuple[list[dict[str, Any]], Tensor, list[int]]:
    """(what each layer holds behind the prompt, first logits, generated tokens)."""
    model = smollm2()
    ids = case.inputs["context_ids"].long()[None]
    question = case.inputs["question_ids"].long()[None]
    with attach(model, part) as session:
        cache = cache_of(model(ids, use_cache=True, logits_to_keep=1))
        held = [
            {
                "held": layer.context_slots + layer.dense_slots,
                "seen": layer.get_seq_length(),
                "columns": layer.columns(),
            }
            for layer in session.cache.layers
        ]
        out = model(question, **with_cache(model, cache), logits_to_keep=1).logits[0, -1]
        first, generated = out, []
        for _ in case.outs["generated_ids"]:
            generated.append(int(out.argmax()))
            out = model(torch.tensor([generated[-1:]]), **with_cache(model, cache)).logits[0, -1]
    return held, first, generated


def said(case: Case, first: Tensor, generated: list[int]) -> Iterator[Check]:
    top = case.outs["first_logits_top10_ids"].long()
    yield case.compare("out.first_logits_top10", first[top])
    wrong = sum(a != b for a, b in zip(generated, case.outs["generated_ids"].tolist(), strict=True))
    yield Check("out.generated_ids: tokens that differ", float(wrong), 0.0)


def kept_otherwise(case: Case, name: str, ours: Tensor, theirs: Tensor, scores: Tensor) -> Check:
    """How many tokens are kept by one side alone, those with scores next to the last kept aside."""
    ours, theirs = (
        torch.zeros_like(scores, dtype=torch.bool).scatter(-1, kept.long(), True)
        for kept in (ours, theirs)
    )
    edge = scores.masked_fill(~theirs, torch.inf).amin(dim=-1, keepdim=True)
    near = (scores - edge).abs() <= 2 * (case.atol + case.rtol * edge.abs())
    alone = float(((ours != theirs) & ~near).sum())
    return Check(f"{name}: tokens kept by one side alone", alone, 0.0)


@adapter("duo-attention", mechanism="duo-attention")
def duo_attention(case: Case) -> Iterator[Check]:
    """The streaming mask, streaming heads alone, and the mixture by gates."""
    config = case.config
    q, k, v = (case.inputs[name] for name in "qkv")
    sizes = {"sinks": config["sink_size"], "recent": config["recent_size"]}
    tokens = q.shape[2]
    mask = masks.dense(streaming(**sizes), tokens, tokens)[0, 0]
    yield case.compare("mid.mask", mask)
    gates = case.params["full_attention_heads"]
    yield case.compare("mid.streaming_o", mixture(q, k, v, torch.zeros_like(gates), **sizes))
    yield case.compare("out.o", mixture(q, k, v, gates, **sizes))


@adapter("model-duo-attention", mechanism="duo-attention")
def duo_attention_on_model(case: Case) -> Iterator[Check]:
    """Given gates on the real language model: which heads stream, and what they forget."""
    config = case.config
    question, answer = len(case.inputs["question_ids"]), len(case.outs["generated_ids"])
    part = DuoAttention(
        config["head_compression_ratio"],
        pattern=case.inputs["head_scores"],
        sinks=config["sink_size"],
        recent=config["recent_size"],
        block=question + answer + 1,  # theirs forgets nothing behind the prompt
    )
    cache, first, generated = answered(case, part)
    streams = torch.stack([~part.retrieves[i] for i in sorted(part.retrieves)])
    yield case.compare("out.streaming_mask", streams)
    for number in config["layers_saved"]:
        theirs = case.outs[f"removed_mask.layer{number}"]
        removed = torch.ones(theirs.shape[0], theirs.shape[1] + 1)
        columns = cache[number]["columns"]
        columns = torch.arange(theirs.shape[1]) if columns is None else columns[0]
        columns = columns.expand(theirs.shape[0], -1).long()
        at = torch.where(columns < 0, theirs.shape[1], columns)
        yield case.compare(
            f"out.removed_mask.layer{number}", removed.scatter(1, at, 0.0)[:, :-1]
        )  # fmt: skip
    # Theirs hides the pairs and keeps the length: what a cache of ours says it has seen.
    yield case.compare("out.kept_per_layer", torch.tensor([layer["seen"] for layer in cache]))
    yield from said(case, first, generated)
