"""Runs of a model that are kept, patched and compared: what causal papers are made of.

    clean = kept(model, prompts.clean, ("heads",))                       a run and what passed in it
    logits_with(model, ids, Replace({"heads": clean.passed["heads"]}))   another run, patched
    patched_heads(model, prompts)                                        the effect of each head
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attlas.attach import attach
from attlas.attach.part import Part
from attlas.errors import UserError
from attlas.inspect.prompts import Prompts, effect, logit_difference
from attlas.parts.patch.ablate_heads import AblateHeads
from attlas.parts.patch.replace import Replace
from attlas.parts.record.activations import Activations

#: Heads by layer.
Heads = Mapping[int, Iterable[int]]


def silent(share: float) -> None:
    """A tick that tells nobody."""


@dataclass(frozen=True)
class Run:
    """A forward pass.

    Attributes:
        logits: [rows, tokens, vocabulary].
        passed: what passed the points that were asked for, {point: [layers, rows, tokens, ...]}.
    """

    logits: Float[Tensor, "rows tokens vocabulary"]
    passed: Mapping[str, Tensor]


def kept(
    model: nn.Module, ids: Int[Tensor, "rows tokens"], what: tuple[str, ...], *parts: Part
) -> Run:
    """A run with parts attached, and what passed in it, see `activations`."""
    recorder = Activations(what)
    with torch.no_grad(), attach(model, *parts, record=[recorder], compile=False) as session:
        logits = _logits(model, ids)
        return Run(logits, session["activations"])


def logits_with(
    model: nn.Module, ids: Int[Tensor, "rows tokens"], *parts: Part
) -> Float[Tensor, "rows tokens vocabulary"]:
    """The logits with parts attached."""
    with torch.no_grad(), attach(model, *parts, compile=False):
        return _logits(model, ids)


def _logits(model: Any, ids: Tensor) -> Tensor:
    found = model(input_ids=ids)
    if getattr(found, "logits", None) is None:
        raise UserError(f"{type(model).__name__} gives no logits; take the model with its head")
    logits: Tensor = found.logits
    return logits


def differences(model: nn.Module, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Mean logit difference of the clean prompts and of the corrupted ones, towards the clean answers."""
    clean, corrupted = (
        logit_difference(logits_with(model, ids), prompts.answers).mean()
        for ids in (prompts.clean, prompts.corrupted)
    )
    return clean, corrupted


def patched_heads(
    model: nn.Module,
    prompts: Prompts,
    positions: tuple[int, ...] | None = None,
    tick: Callable[[float], None] = silent,
) -> Float[Tensor, "layers heads"]:
    """Mean effect of each head: corrupted prompts, its output replaced by that of the clean run.

    Args:
        model: with its head.
        prompts: on the model's device.
        positions: tokens whose outputs are replaced; all unless given.
        tick: told the share done.
    """
    values = kept(model, prompts.clean, ("heads",)).passed["heads"]
    clean, corrupted = differences(model, prompts)
    layers, heads = values.shape[0], values.shape[3]
    found = values.new_empty(layers, heads, dtype=torch.float64)
    for layer in range(layers):
        for head in range(heads):
            part = Replace({"heads": values}, heads={layer: [head]}, positions=positions)
            logits = logits_with(model, prompts.corrupted, part)
            found[layer, head] = logit_difference(logits, prompts.answers).mean().double()
        tick((layer + 1) / layers)
    return effect(found, clean.double(), corrupted.double())


def patched_points(
    model: nn.Module, prompts: Prompts, point: str, tick: Callable[[float], None] = silent
) -> Float[Tensor, "layers tokens"]:
    """Mean effect of replacing `residual`, `attention` or `mlp` of each layer at each token."""
    values = kept(model, prompts.clean, (point,)).passed[point]
    clean, corrupted = differences(model, prompts)
    layers, tokens = values.shape[0], values.shape[2]
    found = values.new_empty(layers, tokens, dtype=torch.float64)
    for layer in range(layers):
        for token in range(tokens):
            part = Replace({point: values}, layers=[layer], positions=(token,))
            logits = logits_with(model, prompts.corrupted, part)
            found[layer, token] = logit_difference(logits, prompts.answers).mean().double()
        tick((layer + 1) / layers)
    return effect(found, clean.double(), corrupted.double())


def mean_heads(
    model: nn.Module, ids: Int[Tensor, "rows tokens"]
) -> Float[Tensor, "layers heads value_dim"]:
    """Each head's mean output over the tokens of some texts, for `ablate-heads`."""
    found: Tensor = kept(model, ids, ("heads",)).passed["heads"].mean(dim=(1, 2))
    return found


def without(heads: Heads, means: Tensor | None = None) -> list[Part]:
    """Parts that ablate these heads, to zero or to their means; none for no heads."""
    chosen = {layer: tuple(each) for layer, each in heads.items() if tuple(each)}
    return [AblateHeads(heads=chosen, means=means)] if chosen else []


def by_layer(heads: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """(layer, head) pairs as heads of each layer."""
    found: dict[int, list[int]] = {}
    for layer, head in heads:
        found.setdefault(layer, []).append(head)
    return found


def faithfulness(
    model: nn.Module, prompts: Prompts, circuit: Iterable[tuple[int, int]], means: Tensor
) -> float:
    """LD of the circuit alone over LD of the whole model, all other heads replaced by their means.

    Args:
        model: with its head.
        prompts: whose clean prompts are run.
        circuit: (layer, head) of its heads.
        means: of each head's output, over prompts of the same kind whose answers differ.

    Raises:
        ValueError: the whole model does not tell right from wrong.
    """
    layers, heads, _ = means.shape
    chosen = set(circuit)
    others = [(x, h) for x in range(layers) for h in range(heads) if (x, h) not in chosen]
    alone = logits_with(model, prompts.clean, *without(by_layer(others), means))
    whole = logits_with(model, prompts.clean)
    part, full = (logit_difference(x, prompts.answers).mean() for x in (alone, whole))
    if full == 0:
        raise UserError("the model gives right and wrong answers the same logits; take other prompts")
    return float(part / full)
