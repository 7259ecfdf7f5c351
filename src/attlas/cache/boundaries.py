"""Where a text turns, told from its keys: the predictor of dynamic hierarchical sparse attention.

    b(k): two windows of w keys, left and right of a position, attend to each other; with l, r the means
    of both, an MLP of [l, r, |l − r|, l ∘ r, cos(l, r)]

It is trained on what a model's attention says, see `attlas.parts.select.dynamic_hierarchical`.
"""

from __future__ import annotations

from math import gcd

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cosine_similarity, pad

from attlas import ops
from attlas.attach.call import Call
from attlas.attach.part import Part
from attlas.errors import UserError

#: w, keys of a window, and the MLP's width.
WINDOW, WIDTH = 4, 256
#: The ratio of a boundary, the weight of positives, and the exponent of 1 − p.
RATIO, POSITIVE, FOCAL = 2.0, 1.3, 2.0
#: Positions taken of each layer of a text, positions of a step, how often all are read, and the rate.
SAMPLED, BATCH, EPOCHS, RATE = 128, 1024, 8, 1e-3


def windows(
    flat: Float[Tensor, "tokens width"], at: Int[Tensor, " some"]
) -> Float[Tensor, "some both width"]:
    """The w tokens up to each of these positions, and the w behind it; zeros beyond the text."""
    steps = torch.arange(2 * WINDOW, device=flat.device)
    return pad(flat, (0, 0, WINDOW - 1, WINDOW))[at[:, None] + steps]


class Boundaries(nn.Module):
    """b: the logit that a text turns between the two halves of a window.

    Args:
        width: channels of a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(width, gcd(8, width), batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.judge = nn.Sequential(nn.Linear(4 * width + 1, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))

    def forward(self, both: Float[Tensor, "some both width"]) -> Float[Tensor, " some"]:
        """A logit for each window."""
        mixed = self.norm(self.mix(both, both, both, need_weights=False)[0])
        left, right = mixed[:, :WINDOW].mean(1), mixed[:, WINDOW:].mean(1)
        alike = cosine_similarity(left, right, dim=-1, eps=1e-6)[:, None]
        told = torch.cat((left, right, (left - right).abs(), left * right, alike), dim=-1)
        logits: Tensor = self.judge(told)[:, 0]
        return logits


class Gathered(Part):
    """Windows of keys of all layers, and whether a boundary lies in each."""

    def setup(self) -> None:
        """Nothing has been read."""
        self.windows: list[Tensor] = []
        self.told: list[Tensor] = []

    def observe(self, call: Call) -> None:
        """Some positions of each row."""
        for q, k in zip(call.q.float(), call.k.float(), strict=True):
            scores = ops.grouped_product(q[None] * call.scaling, k[None].mT)
            later = torch.ones(scores.shape[-2:], device=q.device).triu(1).bool()
            weights = ops.softmax(scores.masked_fill(later, -torch.inf))[0].mean(0)
            ratio = ratios(weights)
            generator = torch.Generator().manual_seed(len(self.windows))
            at = torch.randperm(len(ratio), generator=generator)[:SAMPLED].to(q.device)
            flat = k.transpose(0, 1).flatten(1)
            self.windows.append(windows(flat, at + 2 * WINDOW - 1).half().cpu())
            self.told.append((ratio[at] >= RATIO).cpu())


def ratios(weights: Float[Tensor, "tokens tokens"]) -> Float[Tensor, " inner"]:
    """How much more later queries attend to one side of each position than to the other; of the
    positions from 2w − 1 to the 2w-th last."""
    inner = len(weights) - 4 * WINDOW + 1
    if inner < 1:
        return weights.new_zeros(0)
    at = torch.arange(inner, device=weights.device) + 2 * WINDOW - 1
    later = weights.double().flip(0).cumsum(0).flip(0)[at + WINDOW]
    steps = torch.arange(2 * WINDOW, device=weights.device) - WINDOW + 1
    sides = later.gather(1, at[:, None] + steps).unflatten(1, (2, WINDOW)).sum(-1) + 1e-6
    found: Tensor = (sides.amax(-1) / sides.amin(-1)).to(weights.dtype)
    return found


def trained(
    both: Float[Tensor, "positions both width"], told: Bool[Tensor, " positions"]
) -> dict[str, Tensor]:
    """The weights of b, trained to tell boundaries.

    Raises:
        UserError: the texts are too short for a position to be judged.
    """
    if not len(told):
        raise UserError(f"texts must have at least {4 * WINDOW} tokens to calibrate on")
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        model = Boundaries(both.shape[-1])
        adam = torch.optim.Adam(model.parameters(), lr=RATE)
        for _ in range(EPOCHS):
            for some in torch.randperm(len(told)).split(BATCH):
                logits, truth = model(both[some].float()), told[some].float()
                weight = (1 - torch.where(told[some], logits.sigmoid(), (-logits).sigmoid())) ** FOCAL
                loss = binary_cross_entropy_with_logits(
                    logits, truth, pos_weight=torch.tensor(POSITIVE), reduction="none"
                )
                adam.zero_grad()
                (weight * loss).mean().backward()
                adam.step()
    return {name: t.detach() for name, t in model.state_dict().items()}
