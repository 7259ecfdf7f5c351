"""Transformer brain encoder: responses of brain areas from the patches of a frozen backbone.

    t_a   = norm(0)                                                    e_a: the area's query
    A_ap  = softmax_p(W_q (t_a + e_a) · W_k (x_p + P_p) / √d)          x: patch features, P: their places
    t_a   = norm(t_a + W_o Σ_p A_ap W_v x_p + b_o);   t_a = norm(t_a + W_2 relu(W_1 t_a))
    y_u   = w_u · norm(t_a) + b_u               for each unit u of the area; each hemisphere its own w

`body="linear"` leaves t_a = W_o Σ_p A_ap W_v x_p. Then a constant score gives a linear readout of mean
features, and keys of places alone give the spatial-feature baseline: y_u = Σ_p M_a(p) w_u · x_p + b_u
with one map M_a for all pictures. Both, and ridge regression on all patches, are the baselines.

Data: pictures of shapes (`attlas.tasks.scenes`); an area's units respond to one shape wherever it is.
Score of a picture: 1 − squared error / variance, at least 0. Published: width 768, 1024 ReLU units,
dropout 0.1, AdamW at 5e-4, gradients clipped to 0.1, one layer; one head in the paper, and here.

Shapes: features, places [batch dim height width] → [batch units areas] of each hemisphere.
Cost: areas · patches pairs. Reduces to mean pooling with a constant score.
Source: "Transformer brain encoders explain human high-level visual responses".
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from attlas.bases.area_routing import BrainEncoder, SpatialFeature, sines
from attlas.catalog.registry import mechanism
from attlas.errors import UnknownName, UserError
from attlas.kinds.system import Example, System
from attlas.options import option
from attlas.tasks.scenes import SHAPES, SIDE, SIZE, Scene, picture, responses, scene

#: Patches on a side of a picture, and pixels of one.
GRID = 8
PATCH = SIZE // GRID
#: Penalties that ridge regression chooses from, by the last fifth of the training pictures.
PENALTIES = tuple(10.0**k for k in range(-1, 6))


@mechanism(
    "transformer-brain-encoder", aliases=("brain-encoder",),
    example={"backbone": "filters", "dim": 32, "ff": 32, "units": 4, "pictures": 300, "steps": 150,
             "questions": 40, "rate": 3e-3},
)  # fmt: skip
class TransformerBrainEncoder(System):
    """Predicts simulated responses to pictures of shapes."""

    title: ClassVar[str] = "variance explained %"

    encoder: Literal["attention", "map", "ridge"] = option(
        "the transformer, or one of the baselines", default="attention"
    )
    backbone: str = option("a vision model that `attlas.load` takes, or filters", default="vit")
    dim: int = option("random filters, for backbone filters", default=64, at_least=2)
    ff: int = option("ReLU units", default=1024, at_least=1)
    heads: int = option("of the attention", default=1, at_least=1)
    units: int = option("of each area", default=16, at_least=1)
    noise: float = option("standard deviation, of responses up to about 1", default=0.1, at_least=0)
    pictures: int = option("of the training", default=2000, at_least=10)
    questions: int = option("pictures of the test", default=200, at_least=1)
    steps: int = option("of AdamW", default=2000, at_least=0)
    batch: int = option("pictures of a step", default=32, at_least=1)
    rate: float = option("AdamW's learning rate", default=5e-4, above=0)
    clip: float = option("largest norm of a gradient", default=0.1, above=0)

    @property
    def needs(self) -> str | None:
        """The vision model."""
        return None if self.backbone == "filters" else self.backbone

    def build(self, model: Any = None, tokenizer: Any = None) -> None:
        """Take the vision model."""
        self.model = model

    @property
    def gains(self) -> tuple[tuple[float, ...], ...]:
        """Of each area's units, the same whatever the seed."""
        rng = random.Random("gains")
        return tuple(tuple(rng.uniform(0.5, 1.5) for _ in range(self.units)) for _ in SHAPES)

    def data(self, cell: str, seed: int, split: str = "test") -> list[Example]:
        """Scenes with the responses of all units."""
        if cell not in self.cells:
            raise UnknownName("cell", cell, self.cells)
        rng, count = random.Random(f"{seed}/{split}"), self.questions
        scenes = (scene(rng) for _ in range(self.pictures if split == "train" else count))
        return [Example(s, responses(s, self.gains, self.noise)) for s in scenes]

    @torch.no_grad()
    def features(self, scenes: Sequence[Scene]) -> Float[Tensor, "pictures dim grid grid"]:
        """What the frozen backbone makes of the patches."""
        pixels = torch.stack([picture(one) for one in scenes])[:, None]
        if self.backbone == "filters":
            rng = torch.Generator().manual_seed(0)
            filters = torch.randn(self.dim, 1, 8, 8, generator=rng) / 8
            found = relu(nn.functional.conv2d(pixels - 0.15, filters, stride=PATCH, padding=2))
            return (found - found.mean(1, keepdim=True)) * 2
        size = GRID * int(self.model.config.patch_size)
        pieces = [
            self.model(pixel_values=4 * interpolate(some, size).expand(-1, 3, -1, -1) - 1)
            for some in pixels.split(32)
        ]
        states = torch.cat([piece.last_hidden_state[:, -GRID * GRID :] for piece in pieces])
        grid: Tensor = states.mT.unflatten(2, (GRID, GRID))
        return grid

    def _made(self, seed: int, width: int) -> nn.Module:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            count = self.units * len(SHAPES)
            if self.encoder == "attention":
                return BrainEncoder(
                    dim=width, heads=self.heads, ff=self.ff, areas=len(SHAPES), units=(count,)
                )
            if self.encoder == "map":
                return SpatialFeature(width, len(SHAPES), GRID * GRID, count)
            return nn.Linear(width * GRID * GRID, count)

    def _said(self, x: Tensor) -> Float[Tensor, "pictures units"]:
        """What the encoder says of features; each unit is read from its own area."""
        net = self.net
        if self.encoder == "ridge":
            flat: Tensor = net(x.flatten(1))
            return flat
        found = net(x, sines(*x.shape[1:]))[0] if self.encoder == "attention" else net(x)
        own = torch.arange(len(SHAPES)).repeat_interleave(self.units)
        each: Tensor = found[:, torch.arange(len(own)), own]
        return each

    def fit(self, seed: int, tick: Callable[[float], None] = lambda share: None) -> None:
        """Learn from pictures of the split "train"."""
        examples = self.data("test", seed, "train")
        x = self.features([e.input for e in examples])
        y = torch.tensor([e.target for e in examples])
        self.net = self._made(seed, x.shape[1])
        if self.encoder == "ridge":
            weight, bias = ridge(x.flatten(1), y)
            self.net.load_state_dict({"weight": weight.T.contiguous(), "bias": bias})
            return
        adam = torch.optim.AdamW(self.net.parameters(), lr=self.rate, weight_decay=1e-4)
        rng = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            for step in range(self.steps):
                some = torch.randint(len(x), (self.batch,), generator=rng)
                loss = (self._said(x[some]) - y[some]).square().mean()
                adam.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
                adam.step()
                tick((step + 1) / self.steps)
        self.net.eval()

    @torch.no_grad()
    def predict(self, inputs: Sequence[Scene]) -> list[tuple[float, ...]]:
        """The responses of all units to each scene."""
        _check(inputs)
        if getattr(self, "net", None) is None:
            raise UserError("the encoder is not trained yet: call fit")
        return [tuple(row) for row in self._said(self.features(inputs)).tolist()]

    @torch.no_grad()
    def maps(self, inputs: Sequence[Scene]) -> Float[Tensor, "pictures areas grid grid"]:
        """Where each area looks; of encoder "attention" alone."""
        _check(inputs)
        x = self.features(inputs)
        net: Any = getattr(self, "net", None)
        if not isinstance(net, BrainEncoder):
            raise UserError("encoder takes 'attention' for maps, and fit first")
        found: Tensor = net.tokens(x, sines(*x.shape[1:]))[1].unflatten(-1, (GRID, GRID))
        return found

    def guess(self, inputs: Sequence[Scene], seed: int) -> list[tuple[float, ...]]:
        """The mean response of each unit, whatever the picture."""
        _check(inputs)
        mean = tuple(0.35 * gain for area in self.gains for gain in area)
        return [mean for _ in inputs]

    def score(self, said: Sequence[float], target: Sequence[float]) -> float:
        """1 − squared error / variance of the responses, at least 0."""
        pairs = list(zip(said, target, strict=True))
        error = sum((a - b) ** 2 for a, b in pairs) / len(pairs)
        spread = sum(0.1375 * gain**2 for area in self.gains for gain in area) / len(pairs)
        return max(0.0, 1 - error / (spread + self.noise**2))

    def state(self) -> dict[str, Tensor]:
        """The encoder's weights."""
        net = getattr(self, "net", None)
        return {} if net is None else dict(net.state_dict())

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights."""
        width = self.dim if self.backbone == "filters" else int(self.model.config.hidden_size)
        self.net = self._made(0, width).eval()
        self.net.load_state_dict(state)


def explained(said: Sequence[Sequence[float]], target: Sequence[Sequence[float]]) -> float:
    """Share of the variance over pictures that is explained, the mean over units."""
    a, b = torch.tensor(said), torch.tensor(target)
    return float((1 - (a - b).square().mean(0) / b.var(0, correction=0)).mean())


def ridge(
    x: Float[Tensor, "pictures width"], y: Float[Tensor, "pictures units"]
) -> tuple[Float[Tensor, "width units"], Float[Tensor, " units"]]:
    """(weights, bias) of ridge regression, its penalty chosen by the last fifth of the pictures."""
    cut, best = len(x) - len(x) // 5, (math.inf, PENALTIES[0])
    for penalty in PENALTIES:
        weight, bias = _solved(x[:cut], y[:cut], penalty)
        error = float((x[cut:] @ weight + bias - y[cut:]).square().mean())
        best = min(best, (error, penalty))
    return _solved(x, y, best[1])


def _solved(x: Tensor, y: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    mean, level = x.mean(0), y.mean(0)
    centred = x - mean
    gram = centred @ centred.T
    gram.diagonal().add_(penalty)
    weight = centred.T @ torch.linalg.solve(gram, y - level)
    return weight, level - mean @ weight


def on_shape(place: int, shape: tuple[int, int, int, float]) -> bool:
    """Whether a patch, by its number, covers a part of a shape."""
    row, column = (PATCH * n for n in divmod(place, GRID))
    _, top, left, _ = shape
    return top - PATCH < row < top + SIDE and left - PATCH < column < left + SIDE


def _check(inputs: Sequence[object]) -> None:
    if not all(isinstance(one, Scene) for one in inputs):
        raise UserError(f"inputs takes scenes of `data`, got {[type(i).__name__ for i in inputs]}")
