"""Adapter of GUI-KV to its published numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from attlas.attach.call import Call, ForwardPass
from attlas.cache.policy import best_slots
from attlas.contract.cases import Case, Check, adapter
from attlas.parts.evict.gui_kv import GuiKV
from attlas.storage.layer import LayerState, StoredLayer


@adapter("gui-kv", mechanism="gui-kv")
def gui_kv(case: Case) -> Iterator[Check]:
    """The kept prefix in order of falling score; ours is in order of position.

    Published code repeats the keys of a group for its query heads, so these are heads of their own;
    without hidden states it leaves both terms out.
    """
    config = case.config
    q, k, v = (case.inputs[name] for name in "qkv")
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    case.sizes(q, "B heads T head_dim")
    hidden = case.inputs.get("hidden_states")
    spans = zip(config["vision_start_idx"], config["vision_end_idx"], strict=True)
    policy = GuiKV(
        tokens=config["max_capacity_prompt"],
        images=() if hidden is None else tuple(spans),
        window=config["window_size"],
        kernel=config["kernel_size"],
        pooling=config["pooling"].removesuffix("pool"),
        alpha=float(config["alpha"]),
        temperature=float(config["temperature"]),
    )
    state = LayerState(0, (0,), scaling=q.shape[-1] ** -0.5)
    layer, module = StoredLayer({policy.name: state}), nn.Identity()
    layer.update(k, v)
    states = torch.zeros(q.shape[0], q.shape[2], 1) if hidden is None else hidden
    step = ForwardPass(length=q.shape[2], hidden={module: states})
    policy.learn(state, Call(0, module, q, k, v, state.scaling, None, step, is_causal=True))
    slots = policy.slots(layer, state, layer.rows())
    scores = policy.scores(state, slots)
    prefix = best_slots(scores, slots.valid, slots.budget)[0][..., : -policy.window]
    order = scores.gather(-1, prefix).argsort(dim=-1, descending=True)
    prefix = prefix.gather(-1, order)
    theirs = case.outs["kept_prefix_indices"].long()
    # Of equal scores (pooling makes some, and what is repeated has none) either may be taken.
    ours_at, theirs_at = scores.gather(-1, prefix), scores.gather(-1, theirs)
    equal = (ours_at - theirs_at).abs() <= case.atol + case.rtol * theirs_at.abs()
    yield case.compare("out.kept_prefix_indices", torch.where(equal, theirs, prefix))
