"""Routers that say, for each prompt and layer, full or sparse attention; and their training.

    u      = mean over heads and tokens of q, of the first and the last `pool` tokens, before rotation
    logits = W₅ silu(W₄ silu(W₃ (W₂ silu(W₁ u))))                     two: sparse, full
    z      = 1 where softmax((logits + Gumbel noise) / τ) favours full; its gradient that of the softmax
    out    = z full attention + (1 − z) sparse attention
    loss   = next tokens + λ₁ |s − b| + λ₂ (s − b)²                   s: share of the layers with z = 0

The model is frozen. Texts with passkeys asked for at their end, and plain ones, take turns; each kind has
a budget b and λs of its own, which rise against the loss. τ falls from 1.5 to 1 over the first 60 %.
Routers and λs learn by Adam, the step rising over the first fifth and then falling as a cosine.

Source: "Flux Attention: Context-Aware Hybrid Attention for Efficient LLMs Inference" and its code.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attlas import masks
from attlas.attach import attach
from attlas.attach.call import Call
from attlas.attach.part import Part
from attlas.attach.thinned import is_prompt, texts
from attlas.cache.duo_gates import SHORTEST, passkeys, streaming
from attlas.calibration.frozen import frozen
from attlas.calibration.statistics import Calibration
from attlas.errors import UserError
from attlas.options import option
from attlas.storage.files import fingerprint
from attlas.storage.rotary import Rotation

#: Learning rate of the λs, in those of the routers.
LAMBDA_RATE = 2
WARM, HOT, COOL = 0.2, 1.5, 0.6
KINDS = ("plain", "retrieval")


class Router(nn.Module):
    """Two logits for each prompt: sparse attention, full attention."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Linear(dim, 8 * dim), nn.SiLU(), nn.Linear(8 * dim, 2 * dim)
        )
        self.head = nn.Sequential(
            nn.Linear(2 * dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim), nn.SiLU(),
            nn.Linear(dim, 2),
        )  # fmt: skip

    def forward(
        self, q: Float[Tensor, "batch heads tokens dim"], pool: int
    ) -> Float[Tensor, "batch 2"]:
        """Logits; tokens that are among the first and the last count twice."""
        ends = torch.cat((q[:, :, :pool], q[:, :, -pool:]), dim=2)
        logits: Tensor = self.head(self.features(ends.float().mean((1, 2))))
        return logits


def unrotated(call: Call, q: Tensor, positions: Tensor, rotation: Rotation | None) -> Tensor:
    """Queries before their rotation."""
    if rotation is None:
        return q
    rotary = rotation.now()
    cos, sin = rotary.back(positions)
    return rotary.turn(q.float(), cos[:, None], sin[:, None])


class Routed(Part):
    """Attention of each layer mixed by its router's noisy decision, which `gates` keeps."""

    routers: nn.ModuleDict = option("by layer", kw_only=False)
    rotations: dict[int, Rotation | None] = option("by layer", kw_only=False)
    pool: int = option("tokens pooled at either end", kw_only=False)
    sinks: int = option("first tokens that sparse attention sees", kw_only=False)
    recent: int = option("newest tokens that it sees", kw_only=False)

    def setup(self) -> None:
        """No noise is drawn yet."""
        self.gates: dict[int, Tensor] = {}
        self.temperature = 1.0
        self.noise = torch.Generator()

    def attend(self, call: Call) -> Float[Tensor, "batch query heads value_dim"] | None:
        """The mixture, in layers that have a router."""
        name = str(call.layer)
        if name not in self.routers or not is_prompt(call):
            return None
        ((_, _, text),) = texts(call)
        q = unrotated(call, text.q, call.positions, self.rotations[call.layer])
        logits = self.routers[name](q, self.pool)
        drawn = torch.rand(logits.shape, generator=self.noise).clamp(1e-8, 1 - 1e-7).to(logits)
        soft = ((logits - (-drawn.log()).log()) / self.temperature).softmax(-1)[:, 1]
        gate = self.gates[call.layer] = (soft > 0.5).to(soft) + soft - soft.detach()
        z = gate[:, None, None, None].to(text.q.dtype)
        near = text.attend(streaming(self.sinks, self.recent))
        mixed: Tensor = z * text.attend(masks.causal) + (1 - z) * near
        return mixed.transpose(1, 2)


@dataclass(frozen=True)
class Recipe:
    """What routers are trained for.

    Attributes:
        pool: tokens pooled at either end.
        sinks: first tokens that sparse attention sees.
        recent: newest tokens that it sees.
        budgets: share of sparse layers that is aimed at, by kind of text.
        steps: of the optimiser.
        rate: its largest.
    """

    pool: int
    sinks: int
    recent: int
    budgets: Mapping[str, float]
    steps: int
    rate: float


def made(layers: Sequence[int], dim: int, seed: int = 0) -> nn.ModuleDict:
    """Untrained routers."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return nn.ModuleDict({str(layer): Router(dim) for layer in layers})


def fit_routers(
    model: Any, rotations: dict[int, Rotation | None], passages: Sequence[Tensor], recipe: Recipe,
    tick: Callable[[int, int], None], partial: Path | None, key: str,
) -> dict[str, Tensor]:  # fmt: skip
    """Weights of trained routers, "layer.name" each.

    Args:
        model: a Transformers decoder.
        rotations: of the layers that have routers.
        passages: of tokens, without padding.
        recipe: what is trained for.
        tick: told of the steps taken.
        partial: keeps what was reached, so that an interrupted training goes on there.
        key: what tells this training from others in that file.

    Raises:
        ValueError: passages in which sparse attention would see everything.
    """
    least, shortest = recipe.sinks + recipe.recent, min(text.shape[1] for text in passages)
    if shortest <= max(least, SHORTEST):
        raise UserError(
            f"sparse attention of sinks={recipe.sinks} and recent={recipe.recent} sees all of a passage "
            f"of {shortest} tokens: calibrate on longer ones (--length), or with fewer recent tokens"
        )
    device: Any = next(model.parameters()).device
    config = model.config.get_text_config(decoder=True)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    routers = made(list(rotations), dim).to(device)
    rise = nn.Parameter(0.5 * torch.rand(2, 2, generator=torch.Generator().manual_seed(0)))
    weights = dict(routers.named_parameters())
    fast = torch.optim.AdamW([*weights.values()], betas=(0.9, 0.95), weight_decay=0.1)
    slow = torch.optim.AdamW([rise], betas=(0.9, 0.95), weight_decay=0.0, maximize=True)
    state = State({**weights, "rise": rise}, (fast, slow), f"{key} {recipe}", model)
    done = state.resumed(partial)
    words = torch.cat([text.flatten() for text in passages]).unique().tolist()
    part = Routed(routers, rotations, recipe.pool, recipe.sinks, recipe.recent)
    tick(done, recipe.steps)
    with torch.enable_grad(), frozen(model):
        for step in range(done, recipe.steps):
            kind = step % 2
            text = passages[step // 2 % len(passages)]
            ids, asked = text, torch.ones_like(text, dtype=torch.bool)
            if KINDS[kind] == "retrieval":
                ids, asked = passkeys(text[0].tolist(), words, random.Random(step))
            share = (step + 1) / recipe.steps
            part.temperature = 1 + (HOT - 1) * (1 + math.cos(math.pi * min(1.0, share / COOL))) / 2
            part.noise.manual_seed(step)
            with attach(model, part):
                logits = model(ids.to(device), use_cache=False).logits[0, :-1]
            loss = cross_entropy(logits[asked[0, 1:]].float(), ids[0, 1:][asked[0, 1:]].to(device))
            sparse = 1 - torch.stack(list(part.gates.values())).mean()
            off = sparse - recipe.budgets[KINDS[kind]]
            loss = loss + (rise[kind].to(device) * torch.stack((off.abs(), off**2))).sum()
            fast.zero_grad()
            slow.zero_grad()
            loss.backward()
            rate = min(1.0, share / WARM) * (1 + math.cos(math.pi * max(0.0, share - WARM) / 0.8)) / 2
            for optimiser, base in ((fast, recipe.rate), (slow, LAMBDA_RATE * recipe.rate)):
                optimiser.param_groups[0]["lr"] = base * rate
                optimiser.step()
            state.keep(partial, step + 1)
            tick(step + 1, recipe.steps)
    return {name: weight.detach() for name, weight in weights.items()}


class State:
    """A training on its way: weights, and what Adam remembers of them, in one file."""

    def __init__(
        self, weights: dict[str, nn.Parameter], optimisers: Sequence[torch.optim.Optimizer],
        key: str, model: nn.Module,
    ) -> None:  # fmt: skip
        self.weights, self.optimisers = weights, optimisers
        self.key, self.model = f"routers {key}", model

    def keep(self, partial: Path | None, done: int) -> None:
        """Write what was reached, where it is to be kept."""
        if partial is None:
            return
        tensors = {name: weight.detach() for name, weight in self.weights.items()}
        for number, optimiser in enumerate(self.optimisers):
            for place, known in optimiser.state_dict()["state"].items():
                tensors |= {f"adam.{number}.{place}.{name}": t for name, t in known.items()}
        Calibration(self.key, fingerprint(self.model), tensors, {"done": done}).save(partial)

    def resumed(self, partial: Path | None) -> int:
        """Take what was kept; tells the steps taken, none if it was another training."""
        if partial is None or not partial.exists():
            return 0
        try:
            found = Calibration.load(partial)
            found.check(self.key, self.model, str(partial))
        except UserError:  # of other texts, or cut short: begin again
            return 0
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(found.tensors[name])
        for number, optimiser in enumerate(self.optimisers):
            states: dict[int, dict[str, Tensor]] = {}
            for name, tensor in found.tensors.items():
                if name.startswith(f"adam.{number}."):
                    _, _, place, what = name.split(".")
                    states.setdefault(int(place), {})[what] = tensor
            optimiser.load_state_dict({**optimiser.state_dict(), "state": states})
        return int(found.about["done"])
