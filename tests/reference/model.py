"""Published runs of a policy on the real language model, and ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attlas.attach.part import Part
from attlas.attach.session import attach
from attlas.cache.policy import CachePolicy
from attlas.contract.cases import Case, Check
from attlas.errors import UserError
from attlas.hf.caches import cache_of, with_cache
from attlas.storage.layer import LayerState
from reference.policies import kept_otherwise


@cache
def smollm2() -> Any:
    from attlas.models.load import load

    return load("smollm2")


def smollm2_of(case: Case) -> Any:
    """The language model that a case says it was made with.

    Raises:
        UserError: it was made with another one.
    """
    told = str(case.config.get("model", "SmolLM2-135M"))
    if "SmolLM2-135M" not in told:
        raise UserError(f"config 'model' is {told!r}; the adapter takes only SmolLM2-135M")
    return smollm2()


class Held(NamedTuple):
    """What a layer holds behind the prompt: slots on average over heads, tokens seen, their columns."""

    held: int
    seen: int
    columns: Any


class Answer(NamedTuple):
    """What each layer holds behind the prompt, the first logits, and the generated tokens."""

    layers: list[Held]
    first: Tensor
    generated: list[int]


def answered(case: Case, part: Part) -> Answer:
    """The case's context, question and greedy answer with a part attached."""
    model = smollm2_of(case)
    ids = case.inputs["context_ids"].long()[None]
    question = case.inputs["question_ids"].long()[None]
    case.states(context_tokens=ids.shape[1], attn_implementation=("sdpa", "eager"))
    case.without_effect("config.context", "config.question")  # the texts of those ids
    with attach(model, part) as session:
        cache = cache_of(model(ids, use_cache=True, logits_to_keep=1))
        layers = [
            Held(slots_held(layer), layer.get_seq_length(), layer.original_positions())
            for layer in session.cache.layers
        ]
        out = model(question, logits_to_keep=1, **with_cache(model, cache)).logits[0, -1]
        first, generated = out, []
        for _ in case.outs["generated_ids"]:
            generated.append(int(out.argmax()))
            out = model(torch.tensor([generated[-1:]]), **with_cache(model, cache)).logits[0, -1]
    return Answer(layers, first, generated)


def slots_held(layer: Any) -> int:
    """Slots of a layer, on average over its heads."""
    columns = layer.original_positions()
    if columns is None:
        return int(layer.keys.shape[2])
    return int((columns >= 0).sum()) // int(columns[..., 0].numel())


def scored(case: Case, policy: CachePolicy, nudge: float = 0.0) -> tuple[dict[int, Tensor], Answer]:
    """(scores of each layer, the answer) of a policy of ours.

    With a nudge, equal scores are decided for the later token, or the earlier if it is negative.
    """
    scores: dict[int, Tensor] = {}
    score = policy.scores

    def spy(state: LayerState, slots: Any) -> Tensor:
        scores[state.layer] = score(state, slots)
        at = torch.linspace(0, 1, slots.rank.shape[-1])
        return scores[state.layer] + nudge * scores[state.layer].abs() * at

    policy.scores = spy  # type: ignore[method-assign]
    return scores, answered(case, policy)


def top_logits(case: Case, answer: Answer) -> Check:
    """The first token's ten largest logits."""
    top = case.outs["first_logits_top10_ids"].long()
    return case.compare("out.first_logits_top10", answer.first[top])


def tokens_that_differ(case: Case, answer: Answer) -> Check:
    """How many generated tokens are others than the published ones."""
    theirs = case.outs["generated_ids"].tolist()
    wrong = sum(a != b for a, b in zip(answer.generated, theirs, strict=True))
    return Check("out.generated_ids: tokens that differ", float(wrong), 0.0)


def on_model(case: Case, make: Callable[[dict[str, Any]], CachePolicy]) -> Iterator[Check]:
    """Prefill, compression, a question and greedy decoding on the real language model.

    Args:
        case: named `model-...`.
        make: a policy of the case's config, made anew for each run.
    """
    scores, answer = scored(case, make(case.config))
    layers_saved = case.config["layers_saved"]
    for number in layers_saved if scores else ():
        theirs = case.outs[f"scores.layer{number}"]
        yield case.compare(f"out.scores.layer{number}", scores[number][0])
        if f"removed_mask.layer{number}" in case.outs:
            alpha = case.config["alpha_safeguard"]
            yield from removed_otherwise(case, number, answer.layers[number].columns[0], alpha)
            continue
        label, kept = f"kept.layer{number}", answer.layers[number].columns[0]
        yield kept_otherwise(case, f"out.{label}", kept, case.outs[label], theirs)
    # What is hidden counts as held there.
    hidden = any(name.startswith("removed_mask") for name in case.outs)
    held = [layer.seen if hidden else layer.held for layer in answer.layers]
    yield case.compare("out.kept_per_layer", torch.tensor(held))
    logits = top_logits(case, answer)
    # Which of two keys of one norm stays is decided by rounding; the logits may be either's.
    for nudge in (1e-5, -1e-5) if logits.error > logits.bound and scores else ():
        other = top_logits(case, scored(case, make(case.config), nudge)[1])
        logits = min(logits, other, key=lambda check: check.error / check.bound)
    yield logits
    yield tokens_that_differ(case, answer)


def removed_otherwise(case: Case, number: int, kept: Tensor, alpha: float) -> Iterator[Check]:
    """Against a published mask of what is hidden, head by head, for one layer of one row.

    Scores near the last one kept of the layer, or of a head that keeps no more than what it is sure
    of, may be taken either way.
    """
    scores = case.outs[f"scores.layer{number}"]
    theirs = case.outs[f"removed_mask.layer{number}"] == 0
    ours = torch.zeros(len(scores), scores.shape[-1] + 1, dtype=torch.bool)
    ours = ours.scatter(-1, torch.where(kept >= 0, kept, -1).long() % ours.shape[-1], True)[:, :-1]
    share = int(theirs.sum()) // len(scores)
    safe = theirs.sum(dim=-1, keepdim=True) <= int(alpha * share)
    edge = scores.masked_fill(~theirs, torch.inf).amin(dim=-1, keepdim=True)
    edge = torch.where(safe, edge, scores.masked_fill(theirs, -torch.inf).max())
    near = (scores - edge).abs() <= 2 * (case.atol + case.rtol * edge.abs())
    name = f"out.removed_mask.layer{number}"
    yield Check(f"{name}: removed otherwise", float(((ours != theirs) & ~near).sum()), 0.0)
    yield Check(f"{name}: slots held", float((ours.sum() - theirs.sum()).abs()), 0.0)
