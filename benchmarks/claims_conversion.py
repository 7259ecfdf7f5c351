"""Hedgehog's and ReGLA's claims: SmolLM2 with linear attention in place of its own, distilled and tuned.

    1. distilled   every layer by itself, on the inputs that it has in the model as it was:
                   Hedgehog's feature maps alone, by the cross-entropy of its weights from the softmax's;
                   gated attention whole, by the squared error of its output over the output's square
    2. tuned       what stage 1 trained, and low-rank differences of W_Q, W_K, W_V and W_O, on the loss
                   of the language model; the model itself is tuned likewise, by these alone

Texts are Shakespeare's plays, the loss that of held-out pieces. Features of `linear-attention` are elu
+ 1, which have nothing to distil. Gated linear attention gets keys as wide as the model's, to take them
over.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize

import attlas
from attlas.adapting.texts import Texts, held_out
from attlas.kinds.expect import Beats, Expectation, Row, Within
from attlas.models.load import load_tokenizer

MODEL = "softmax"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
#: Options in place of the mechanism's own.
OPTIONS: dict[str, dict[str, Any]] = {"gated-linear-attention": {"key_dim": 64}}
#: What has weights to distil: those that are normalised.
WEIGHED = ("linear-attention", "hedgehog")


@dataclass(frozen=True)
class Sizes:
    """Of the experiment."""

    distil: int = 200
    tune: int = 300
    batch: int = 8
    length: int = 256
    tested: int = 128
    rank: int = 8


QUICK = Sizes(distil=2, tune=2, batch=1, length=48, tested=2)


class LowRank(nn.Module):
    """W + B A, B from zero."""

    def __init__(self, out: int, into: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(rank, into) / into**0.5)
        self.b = nn.Parameter(torch.zeros(out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


@dataclass
class Conversion:
    """A model on its way from softmax to another attention."""

    kind: str
    seed: int
    sizes: Sizes

    def __post_init__(self) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.teacher: Any = attlas.load("smollm2").to(self.device).eval()
        self.teacher.requires_grad_(False)
        self.model: Any = copy.deepcopy(self.teacher)
        self.teacher.set_attn_implementation("eager")
        tokenizer = load_tokenizer("smollm2")
        self.texts = Texts(tokenizer, None, self.sizes.length)
        pieces = held_out(tokenizer, self.sizes.tested * self.sizes.length, self.sizes.length)
        self.pieces = torch.cat(pieces).to(self.device)
        if self.kind != MODEL:
            attlas.swap(self.model, self.kind, **OPTIONS.get(self.kind, {}))
            self.model.to(self.device)
        self.layers = [layer.self_attn for layer in self.model.model.layers]

    def autocast(self) -> Any:
        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()

    def batch(self, step: int) -> Tensor:
        return self.texts.batch(self.sizes.batch, self.seed, step).to(self.device)

    @torch.no_grad()
    def loss(self) -> float:
        """Nats a token of the held-out pieces."""
        total, count = 0.0, 0
        for some in self.pieces.split(16):
            with self.autocast():
                logits = self.model(some, use_cache=False).logits[:, :-1]
            total += float(
                cross_entropy(logits.flatten(0, 1).float(), some[:, 1:].flatten(), reduction="sum")
            )
            count += some[:, 1:].numel()
        return total / count

    @torch.no_grad()
    def shown(self, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(input, output, weights) of every attention of the model as it was."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        hooks = [
            layer.self_attn.register_forward_hook(
                lambda module, args, kwargs, out: found.append((kwargs["hidden_states"], *out[:2])),
                with_kwargs=True,
            )
            for layer in self.teacher.model.layers
        ]
        try:
            self.teacher.model(ids, use_cache=False, output_attentions=True)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def far(self, attention: Any, x: Tensor, out: Tensor, weights: Tensor) -> Tensor:
        """How far a layer is from the model's: KL of its weights, or the relative error of its output."""
        if self.kind in WEIGHED:
            q, k, _, inputs = attention.prepare(x)
            logs = attention.weigh(q, k, inputs).clamp(min=1e-12).log()
            far: Tensor = (weights * (weights.clamp(min=1e-12).log() - logs)).sum(-1).mean()
            return far
        error: Tensor = (attention(x) - out).square().mean() / out.square().mean()
        return error

    @torch.no_grad()
    def distance(self) -> float:
        """The mean over layers and held-out pieces."""
        found = []
        for some in self.pieces[:32].split(8):
            shown = self.shown(some)
            found += [
                float(self.far(layer.attention, *each))
                for layer, each in zip(self.layers, shown, strict=True)
            ]
        return sum(found) / len(found)

    def new(self) -> list[nn.Parameter]:
        """What stage 1 trains."""
        if self.kind == MODEL:
            return []
        kept = PROJECTIONS if self.kind in WEIGHED else ()
        return [
            weight for layer in self.layers for name, weight in layer.attention.named_parameters()
            if name.partition(".")[0] not in kept
        ]  # fmt: skip

    def distil(self) -> None:
        """Every layer on what it is given in the model as it was."""
        trained = self._only(self.new())
        if not trained:
            return
        rate = 1e-2 if self.kind in WEIGHED else 1e-3
        adam, total = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0), self.sizes.distil
        for step in range(total):
            _rate(adam, rate, step, total)
            for layer, each in zip(self.layers, self.shown(self.batch(step)), strict=True):
                self.far(layer.attention, *each).backward()  # layers share nothing
            adam.step()
            adam.zero_grad()
            if step % 20 == 0:
                print(f"{self.kind} seed {self.seed}: distilled {step} of {total}", flush=True)

    def tune(self) -> None:
        """On the loss of the language model."""
        new = self.new()
        for layer in self.layers:
            own = layer if self.kind == MODEL else layer.attention
            for name in PROJECTIONS:
                linear = getattr(own, name)
                low = LowRank(*linear.weight.shape, self.sizes.rank).to(self.device)
                parametrize.register_parametrization(linear, "weight", low)
                new += list(low.parameters())
        rate, total = 1e-3, self.sizes.tune
        trained = self._only(new)
        adam = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        for step in range(total):
            _rate(adam, rate, step, total)
            ids = self.batch(self.sizes.distil + step)
            with self.autocast():
                logits = self.model(ids, use_cache=False).logits[:, :-1]
            cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            adam.step()
            adam.zero_grad()
            if step % 20 == 0:
                print(f"{self.kind} seed {self.seed}: tuned {step} of {total}", flush=True)

    def _only(self, trained: list[nn.Parameter]) -> list[nn.Parameter]:
        """These ask for gradients, each once, and nothing else does."""
        self.model.requires_grad_(False)
        for weight in trained:
            weight.requires_grad_(True)
        return list(dict.fromkeys(trained))


def _rate(adam: torch.optim.Optimizer, rate: float, step: int, total: int) -> None:
    """Up over a tenth of the steps, and down in a line."""
    warm = max(1, total // 10)
    for group in adam.param_groups:
        group["lr"] = rate * min((step + 1) / warm, (total - step) / max(1, total - warm), 1.0)


def converted(kind: str, seed: int, quick: bool) -> Iterator[Row]:
    """Losses before, between and behind the stages."""
    one = Conversion(kind, seed, QUICK if quick else Sizes())
    what = "KL of weights" if kind in WEIGHED else "error of outputs"
    unit = " nats" if kind in WEIGHED else ""
    yield Row(f"{kind}, as converted", one.loss(), " nats", "lower")
    if kind != MODEL:
        yield Row(f"{kind}, {what} as converted", one.distance(), unit, "lower")
        one.distil()
        yield Row(f"{kind}, {what} distilled", one.distance(), unit, "lower")
        yield Row(f"{kind}, distilled", one.loss(), " nats", "lower")
    one.tune()
    yield Row(f"{kind}, tuned", one.loss(), " nats", "lower")


@dataclass(frozen=True)
class Claimed:
    """What is claimed, and of which kinds of attention it is measured."""

    says: str
    cells: tuple[str, ...]
    expects: tuple[Expectation, ...]
    derived: Callable[[list[Row]], list[Row]] = lambda rows: []

    @property
    def set_up(self) -> str:
        s = Sizes()
        return (
            f"SmolLM2-135M, {s.distil} steps a layer by itself and {s.tune} on the plays, {s.batch} "
            f"pieces of {s.length} tokens, differences of rank {s.rank}; nats of {s.tested} held-out "
            "pieces"
        )

    def rows(self, cell: str, seed: int, quick: bool) -> Iterator[Row]:
        return converted(cell, seed, quick)


def recovered(rows: list[Row]) -> list[Row]:
    """Of what conversion loses, how much distillation and tuning bring back, seed by seed."""
    found = {row.name: [other.value for other in rows if other.name == row.name] for row in rows}
    made = []
    for kind in WEIGHED:
        names = [f"{each}, {when}" for when in ("as converted", "tuned") for each in (kind, MODEL)]
        for start, whole, end, best in zip(*(found[name] for name in names), strict=True):
            made.append(
                Row(
                    f"{kind}, recovered", 100 * (1 - (end - best) / (start - whole)), " %", "higher"
                )
            )
    return made


CONVERSIONS = {
    "hedgehog": Claimed(
        "distilled features come nearer to the softmax than elu features do, and tuning then recovers "
        "most of what conversion loses",
        (MODEL, "linear-attention", "hedgehog"),
        (
            Beats("hedgehog, KL of weights distilled", "linear-attention, KL of weights distilled"),
            Within("hedgehog, recovered", least=50.0),
            Beats("hedgehog, tuned", "linear-attention, tuned"),
        ),
        recovered,
    ),
    "regla": Claimed(
        "converted from a pretrained model it is better than plain gated linear attention after equal "
        "tuning",
        ("gated-linear-attention", "regla"),
        (Beats("regla, tuned", "gated-linear-attention, tuned"),),
    ),
}
