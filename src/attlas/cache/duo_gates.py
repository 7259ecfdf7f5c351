"""Which heads retrieve: a gate per key head, optimised so that as few as possible keep everything.

    out  = α·full attention + (1 − α)·attention over sinks and recent tokens      0 ≤ α ≤ 1
    loss = ‖h − h_full‖² (mean over channels and answers) + 0.05·mean α

h are the model's last hidden states. The texts hide passkeys: random sequences of tokens, each behind
a mark of its own, asked for at the end by their marks. All other weights stay as they are; Adam, from
α = 1, with a step that rises over the first fifth and falls over the last.

The authors' training program takes 2000 steps on texts of 1000 to 32000 tokens, with 128 sinks and 256
recent tokens; here steps are as many as asked for, the passages are short, and sinks and recent tokens
are as many to a passage as `SHARES` says. Its marks are English sentences; the texts come here as numbers
of tokens, so that marks are random too.

Source: "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads".
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attlas import masks, ops
from attlas.attach import attach
from attlas.attach.call import Call
from attlas.attach.part import Part
from attlas.calibration.frozen import frozen
from attlas.calibration.statistics import Calibration
from attlas.errors import UserError
from attlas.hf.sources import kv_heads
from attlas.masks import Mask
from attlas.options import option
from attlas.positions import ScoreMod
from attlas.storage.files import fingerprint

RATE, PENALTY = 0.02, 0.05
#: Sinks and recent tokens, as shares of a passage.
SHARES = (1 / 64, 1 / 16)
#: Tokens of the shortest passage in which a passkey can be hidden and asked for out of reach.
SHORTEST = 24


def streaming(sinks: int, recent: int) -> Mask:
    """What a streaming head sees: the first tokens and the most recent ones."""
    near = masks.causal & masks.window(recent)
    return near | (masks.causal & masks.sinks(sinks)) if sinks else near


def mixture(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    v: Float[Tensor, "batch kv_heads tokens v_dim"],
    gates: Float[Tensor, " kv_heads"],
    *,
    sinks: int,
    recent: int,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
) -> Float[Tensor, "batch heads tokens v_dim"]:
    """Full attention and streaming attention of every head, mixed by the gate of its key head."""
    alpha = gates.clamp(0, 1).repeat_interleave(q.shape[1] // k.shape[1]).to(q.dtype)[:, None, None]
    whole, part = (
        ops.attend(q, k, v, mask=mask, score_mod=score_mod, scale=scale)
        for mask in (masks.causal, streaming(sinks, recent))
    )
    return alpha * whole + (1 - alpha) * part


class Gated(Part):
    """Attention of full-attention layers mixed by gates."""

    gates: Tensor = option("gates by layer and key head", kw_only=False)
    layers: Sequence[int] = option("numbers of the full-attention layers", kw_only=False)
    sinks: int = option("first tokens that streaming attention sees", kw_only=False)
    recent: int = option("most recent tokens that it sees", kw_only=False)

    def attend(self, call: Call) -> Float[Tensor, "batch query heads value_dim"] | None:
        """The mixture, in the layers that have gates."""
        if call.layer not in self.layers:
            return None
        if call.sinks is not None:
            raise UserError("gates cannot be fitted to a model whose heads have sink logits")
        mixed = mixture(
            call.q, call.k, call.v, self.gates[call.layer], sinks=self.sinks, recent=self.recent,
            scale=call.scaling, score_mod=call.score_mod,
        )  # fmt: skip
        return mixed.transpose(1, 2)


@dataclass
class Fit:
    """Gates on their way.

    Attributes:
        gates: by layer and key head.
        done: steps taken.
        mean: Adam's mean of the gradients.
        square: and of their squares.
    """

    gates: Tensor
    mean: Tensor
    square: Tensor
    done: int = 0

    @classmethod
    def begun(cls, layers: int, kv_heads: int) -> Fit:
        """Every head retrieves."""
        return cls(torch.ones(layers, kv_heads), *torch.zeros(2, layers, kv_heads))

    def step(self, gradient: Tensor, steps: int) -> None:
        """One step of Adam, back into [0, 1]."""
        fifth = max(1, steps // 5)
        rise, fall = (self.done + 1) / fifth, (steps - self.done) / fifth
        rate = RATE * min(1.0, max(rise, 0.1), max(fall, 0.1))
        self.done += 1
        self.mean = 0.9 * self.mean + 0.1 * gradient
        self.square = 0.999 * self.square + 0.001 * gradient.square()
        mean = self.mean / (1 - 0.9**self.done)
        square = self.square / (1 - 0.999**self.done)
        self.gates = (self.gates - rate * mean / (square.sqrt() + 1e-8)).clamp(0, 1)


def fit_gates(
    model: Any,
    layers: Sequence[int],
    texts: Sequence[Int[Tensor, "1 tokens"]],
    *,
    steps: int,
    tick: Callable[[int, int], None],
    partial: Path | None,
) -> Float[Tensor, "layers kv_heads"]:
    """Gates of a model's full-attention layers `layers`, 1 in the others.

    Args:
        model: a Transformers decoder.
        layers: its full-attention layers.
        texts: passages in which passkeys are hidden, one a step, round and round.
        steps: how many.
        tick: told of the steps taken.
        partial: keeps what was reached, so that an interrupted fit goes on there.

    Raises:
        ValueError: passages too short to hide anything in.
    """
    shortest = min(text.shape[1] for text in texts)
    if shortest < SHORTEST:
        raise UserError(f"gates take passages of at least {SHORTEST} tokens, got {shortest}")
    config = model.config.get_text_config(decoder=True)
    heads = kv_heads(config, min(layers))
    key = _key(texts, steps)
    fit = _resumed(partial, key, model) or Fit.begun(config.num_hidden_layers, heads)
    words = torch.cat([text.flatten() for text in texts]).unique().tolist()
    tick(fit.done, steps)
    with torch.enable_grad(), frozen(model):
        while fit.done < steps:
            text = texts[fit.done % len(texts)]
            ids, asked = passkeys(text[0].tolist(), words, random.Random(fit.done))
            fit.step(_gradient(model, fit.gates, layers, ids, asked), steps)
            if partial is not None:
                tensors = {"gates": fit.gates, "mean": fit.mean, "square": fit.square}
                Calibration(key, fingerprint(model), tensors, {"done": fit.done}).save(partial)
            tick(fit.done, steps)
    return fit.gates


def passkeys(
    text: list[int], words: list[int], rng: random.Random
) -> tuple[Int[Tensor, "1 tokens"], Bool[Tensor, "1 tokens"]]:
    """(the text with passkeys hidden and asked for at its end, which tokens ask or answer).

    It stays as long as it was: a passkey to every 128 tokens, of one token to every 64.
    """
    length = len(text)
    count, size, mark = max(1, min(10, length // 128)), max(2, length // 64), max(1, length // 256)
    keys = [[rng.choice(words) for _ in range(mark + min(size, 32))] for _ in range(count)]
    asked = [token for key in keys for token in key]
    room = length - 2 * len(asked)
    places = sorted(rng.randrange(room + 1) for _ in keys)
    hidden: list[int] = []
    for start, stop, key in zip([0, *places], places, keys, strict=False):
        hidden += text[start:stop] + key
    ids = hidden + text[places[-1] : room] + asked
    return torch.tensor([ids]), torch.arange(length)[None] >= length - len(asked)


def _gradient(
    model: Any, gates: Tensor, layers: Sequence[int], ids: Tensor, asked: Tensor
) -> Tensor:
    """Of the loss on one text, by layer and head."""
    device = next(model.parameters()).device
    ids, asked = ids.to(device), asked.to(device)
    sinks, recent = (max(1, round(share * ids.shape[1])) for share in SHARES)
    alpha = gates.detach().to(device).requires_grad_()
    with torch.no_grad():
        wanted = _hidden(model, ids)[asked]
    with attach(model, Gated(alpha, layers, sinks, recent)):
        got = _hidden(model, ids)[asked]
    loss = (got.float() - wanted.float()).square().mean() + PENALTY * alpha[list(layers)].mean()
    (gradient,) = torch.autograd.grad(loss, alpha)
    return gradient.cpu()


def _hidden(model: Any, ids: Tensor) -> Tensor:
    out = model(ids, use_cache=False, output_hidden_states=True, logits_to_keep=1)
    hidden: Tensor = out.hidden_states[-1]
    return hidden


def _key(texts: Sequence[Tensor], steps: int) -> str:
    numbers = torch.cat([t.flatten() for t in texts]).to(torch.int64).cpu()
    return f"gates {steps} {hashlib.sha256(numbers.numpy().tobytes()).hexdigest()[:16]}"


def _resumed(partial: Path | None, key: str, model: nn.Module) -> Fit | None:
    if partial is None or not partial.exists():
        return None
    try:
        found = Calibration.load(partial)
        found.check(key, model, str(partial))
    except UserError:  # of other texts, or cut short: begin again
        return None
    return Fit(**found.tensors, done=int(found.about["done"]))
