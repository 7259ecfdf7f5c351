"""A small convolutional network that tells shapes on noise apart, for analyses of pictures."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from attlas.tasks.train.shapes import NAMES, Shapes

TASK = Shapes(size=24, least=12, most=18)


class ShapesNet(nn.Module):
    """Three convolutions and the largest of the last one's features; called as classifiers are."""

    def __init__(self, *, norms: bool = True) -> None:
        super().__init__()
        norm = (lambda width: nn.GroupNorm(1, width)) if norms else (lambda width: nn.Identity())
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), norm(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
            nn.Linear(32, len(NAMES)),
        )  # fmt: skip

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.net(pixel_values))


@cache
def shapes_net(seed: int = 0, steps: int = 500) -> ShapesNet:
    """A network trained for some four seconds, which is right in 99 % of cases."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ShapesNet()
        adam = torch.optim.AdamW(model.parameters(), lr=5e-3)
        draw = Generator().manual_seed(seed)
        for step in range(steps):
            for group in adam.param_groups:
                group["lr"] = 5e-3 * min(1.0, (step + 1) / 20, (steps - step) / (0.5 * steps))
            batch = TASK.draw(draw, 32)
            loss = F.cross_entropy(model(batch["pixel_values"]).logits, batch["targets"])
            adam.zero_grad()
            loss.backward()
            adam.step()
    return model.eval()


def shown(seed: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, classes and masks that the training has not seen."""
    return TASK.placed(Generator().manual_seed(1000 + seed), rows)
