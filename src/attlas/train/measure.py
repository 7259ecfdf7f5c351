"""What is measured of a trained model: its scores, and what it costs."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from attlas.attach.session import cache_bytes
from attlas.hf.caches import cache_of, with_cache
from attlas.tasks.train import Task
from attlas.train.build import Net
from attlas.train.data import drawn
from attlas.train.plan import Plan

#: Tokens decoded one by one before the cache is weighed.
DECODED = 4


@torch.no_grad()
def score(net: Net, task: Task, split: str, plan: Plan, accelerator: Accelerator) -> float:
    """The task's score on a split: the same rows for every mechanism and seed."""
    net.eval()
    total, count = 0.0, 0
    for place, begin in enumerate(range(0, plan.tested, plan.batch)):
        batch = drawn(task, min(plan.batch, plan.tested - begin), split, place)
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        with accelerator.autocast():
            output, _ = net(batch)
        sum_, n = task.score(output.float(), batch)
        total, count = total + sum_, count + n
    return total / count


def parameters(net: Net) -> int:
    """Numbers that are trained; shared ones count once."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


@torch.no_grad()
def operations(net: Net, task: Task) -> int:
    """Floating-point operations of a forward pass over one row, matrix products alone.

    Counted on the CPU with attention written out as products, since the counter does not know every
    fused kernel; a causal half that a kernel leaves out is counted as well.
    """
    row = drawn(task, 1, task.splits[0], 0)
    # The counter hooks into whatever asks for gradients, and fails at views of parameters.
    own = copy.deepcopy(net).cpu().float().eval().requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        own(row)
    return int(counter.get_total_flops())


@torch.no_grad()
def cache_weight(net: Net, task: Task, accelerator: Accelerator) -> dict[str, float | None]:
    """Bytes that the decode cache holds for each token of a row of the task, decoded to its end, and
    bytes that each of the last tokens added: none where a state stands for them all.

    None for models that do not decode.
    """
    names = ("cache_bytes_per_token", "cache_growth")
    if net.kind != "decoder":
        return dict.fromkeys(names)
    net.eval()
    row = drawn(task, 1, task.splits[0], 0)
    cache: Any = None
    tokens = row["inputs"] if net.read is not None else row["input_ids"]
    tokens = tokens.to(accelerator.device)
    prompt, held = max(1, tokens.shape[1] - DECODED), []
    with accelerator.autocast():
        for piece in (tokens[:, :prompt], *tokens[:, prompt:].split(1, dim=1)):
            cache = _read_on(net, piece, cache)
            held.append(cache_bytes(cache))
    growth = (held[-1] - held[0]) / max(1, len(held) - 1)
    return dict(zip(names, (held[-1] / tokens.shape[1], growth), strict=True))


def _read_on(net: Net, piece: torch.Tensor, cache: Any) -> Any:
    given = {"input_ids": piece} if net.read is None else {"inputs_embeds": net.read(piece)}
    return cache_of(net.core(**given, **with_cache(net.core, cache), use_cache=True))
