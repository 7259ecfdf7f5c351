"""Published scores and kept tokens of one attention layer, and ours."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from attlas.attach.call import Call, ForwardPass
from attlas.cache.policy import CachePolicy, best_slots
from attlas.contract.cases import Case, Check
from attlas.storage.layer import LayerState, StoredLayer
from attlas.storage.rotary import Rotary


def prompt_call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Call:
    """A prompt's attention in one layer."""
    return Call(
        0, nn.Identity(), q, k, v, scale, None, ForwardPass(length=q.shape[2]), is_causal=True
    )


def run_layer(
    policy: CachePolicy, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary | None = None
) -> tuple[Tensor, Tensor]:
    """(scores, kept columns) of a prompt's queries, keys and values."""
    state = LayerState(0, (0,), rotary=rotary, scaling=q.shape[-1] ** -0.5)
    layer = StoredLayer({policy.name: state})
    layer.update(k, v)
    policy.learn(state, prompt_call(q, k, v, state.scaling))
    slots = policy.slots(layer, state, layer.rows())
    scores = policy.scores(state, slots)
    return scores, best_slots(scores, slots.valid, slots.budget)[0]


def press(case: Case, policy: CachePolicy) -> Iterator[Check]:
    """One attention layer: scores and kept positions."""
    config = case.config
    keys = case.inputs["k_rope"]
    batch, _, tokens, dim = keys.shape
    case.sizes(keys, "B kv_heads T head_dim")
    rotary = Rotary.plain(dim, float(config["rope_theta"]))
    queries = case.inputs.get("q_pre_rope", torch.zeros(batch, config["heads"], tokens, dim))
    queries = rotary.rotate(queries, torch.arange(tokens).expand(batch, -1))
    scores, kept = run_layer(policy, queries, keys, case.inputs.get("v", keys), rotary)
    yield case.compare("out.scores", scores)
    yield kept_otherwise(case, "out.kept", kept, case.outs["kept"], case.outs["scores"])


def kept_otherwise(case: Case, name: str, ours: Tensor, theirs: Tensor, scores: Tensor) -> Check:
    """How many tokens are kept by one side alone, near-ties aside.

    Scores agree within the case's tolerance alone, so tokens whose published score lies that near to
    the last one kept may be chosen either way.
    """
    ours, theirs = (
        torch.zeros_like(scores, dtype=torch.bool).scatter(-1, kept.long(), True)
        for kept in (ours, theirs)
    )
    edge = scores.masked_fill(~theirs, torch.inf).amin(dim=-1, keepdim=True)
    near = (scores - edge).abs() <= 2 * (case.atol + case.rtol * edge.abs())
    return Check(
        f"{name}: tokens kept by one side alone", float(((ours != theirs) & ~near).sum()), 0.0
    )
