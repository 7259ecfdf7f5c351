"""Runs of a model that are kept, patched and compared: what causal papers are made of.

    clean = kept(model, prompts.clean, ("heads",))                       a run and what passed in it
    logits_with(model, ids, Replace({"heads": clean.passed["heads"]}))   another run, patched
    patched_heads(model, prompts)                                        the effect of each head
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attlas.attach import attach
from attlas.attach.part import Part, Recorder
from attlas.errors import UserError
from attlas.hf.caches import cache_of, with_cache
from attlas.inspect.prompts import Prompts, effect, logit_difference
from attlas.parts.patch.ablate_heads import AblateHeads
from attlas.parts.patch.replace import Replace, ReplacePattern
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


def greedy(
    model: Any, ids: Int[Tensor, " tokens"], count: int, parts: Iterable[Part] = (),
    record: Iterable[Recorder] = (), stop: Iterable[int] = (),
) -> list[int]:  # fmt: skip
    """What is most probable behind a prompt, token by token, up to `count` of them.

    Args:
        model: with its head.
        ids: the prompt, of two tokens at least, on the model's device.
        count: tokens at most.
        parts: attached throughout.
        record: see the steps alone, the prompt's last token being the first of them.
        stop: tokens that end it; the last one given is one of them.
    """
    ended, said = set(stop), list[int]()
    with torch.no_grad():
        with attach(model, *parts, compile=False):
            cache = cache_of(model(input_ids=ids[None, :-1], use_cache=True, logits_to_keep=1))
        with attach(model, *parts, record=list(record), compile=False):
            new = ids[None, -1:]
            while len(said) < count and not (said and said[-1] in ended):
                out = model(input_ids=new, use_cache=True, **with_cache(model, cache))
                new = out.logits[:, -1:].argmax(dim=-1)
                said.append(int(new))
    return said


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
    point: str = "heads",
) -> Float[Tensor, "layers heads"]:
    """Mean effect of each head: corrupted prompts, what it does replaced by what it did in the clean run.

    Args:
        model: with its head.
        prompts: on the model's device.
        positions: tokens at which it is replaced; all unless given.
        tick: told the share done.
        point: what is: its output "heads", its queries "q", or its "pattern".
    """
    patch, layers, heads = _patches(model, prompts, positions, point)
    clean, corrupted = differences(model, prompts)
    found = torch.empty(layers, heads, dtype=torch.float64, device=clean.device)
    for layer in range(layers):
        for head in range(heads):
            logits = logits_with(model, prompts.corrupted, patch({layer: [head]}))
            found[layer, head] = logit_difference(logits, prompts.answers).mean().double()
        tick((layer + 1) / layers)
    return effect(found, clean.double(), corrupted.double())


def patched_together(
    model: nn.Module, prompts: Prompts, heads: Iterable[tuple[int, int]],
    positions: tuple[int, ...] | None = None,
) -> float:  # fmt: skip
    """Mean effect of several heads whose outputs are replaced at once."""
    patch, *_ = _patches(model, prompts, positions, "heads")
    clean, corrupted = differences(model, prompts)
    logits = logits_with(model, prompts.corrupted, patch(by_layer(heads)))
    found = logit_difference(logits, prompts.answers).mean()
    return float(effect(found.double(), clean.double(), corrupted.double()))


def _patches(
    model: nn.Module, prompts: Prompts, positions: tuple[int, ...] | None, point: str
) -> tuple[Callable[[Heads], Part], int, int]:
    """(what makes the patch of some heads, layers, heads), from the clean run."""
    if point == "pattern":
        with torch.no_grad(), attach(model, record=["weights"], compile=False) as session:
            _logits(model, prompts.clean)
            pattern = session["weights"]
        return (
            lambda heads: ReplacePattern(pattern, heads=heads, positions=positions),
            pattern.shape[0],
            pattern.shape[2],
        )
    values = kept(model, prompts.clean, (point,)).passed[point]
    by = {point: values}
    return (
        lambda heads: Replace(by, heads=heads, positions=positions),
        values.shape[0],
        values.shape[3],
    )


def patched_points(
    model: nn.Module, prompts: Prompts, point: str, tick: Callable[[float], None] = silent,
    groups: Sequence[tuple[int, ...]] | None = None,
) -> Float[Tensor, "layers groups"]:  # fmt: skip
    """Mean effect of replacing `residual`, `attention`, `mlp` or `heads` of each layer at some tokens.

    Args:
        model: with its head.
        prompts: on the model's device.
        point: see `activations`.
        tick: told the share done.
        groups: tokens that are replaced at once; each token for itself unless given.
    """
    values = kept(model, prompts.clean, (point,)).passed[point]
    clean, corrupted = differences(model, prompts)
    wanted = [(token,) for token in range(values.shape[2])] if groups is None else groups
    layers = values.shape[0]
    found = values.new_empty(layers, len(wanted), dtype=torch.float64)
    for layer in range(layers):
        for number, tokens in enumerate(wanted):
            part = Replace({point: values}, layers=[layer], positions=tokens)
            logits = logits_with(model, prompts.corrupted, part)
            found[layer, number] = logit_difference(logits, prompts.answers).mean().double()
        tick((layer + 1) / layers)
    return effect(found, clean.double(), corrupted.double())


def accuracy(model: nn.Module, prompts: Prompts, *parts: Part) -> float:
    """Share of prompts, clean and corrupted, whose own right answer has the higher logit."""
    clean, corrupted = (
        logit_difference(logits_with(model, ids, *parts), prompts.answers)
        for ids in (prompts.clean, prompts.corrupted)
    )
    return float(torch.cat([clean > 0, corrupted < 0]).double().mean())


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
