"""A language of a Markov chain with repeats, and models of two blocks that learn it in seconds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import attlas

VOCABULARY = 32


def sentences(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Token 0, then a sparse Markov chain in which a third of the steps copy what followed last time.

    Copies need a look back at the token's last occurrence; all else needs none.
    """
    table = torch.rand(VOCABULARY, 4, generator=torch.Generator().manual_seed(7))
    after = (table * (VOCABULARY - 1)).long() + 1
    rows = torch.arange(batch)
    last = torch.zeros(batch, VOCABULARY, dtype=torch.long)
    text = torch.zeros(batch, length, dtype=torch.long)
    for t in range(1, length):
        now = text[:, t - 1]
        step = after[now, torch.randint(4, (batch,), generator=generator)]
        seen = last[rows, now]
        copy = (torch.rand(batch, generator=generator) < 0.6) & (seen > 0)
        text[:, t] = torch.where(copy, seen, step)
        last[rows, now] = text[:, t]
    return text


class Block(nn.Module):
    """Attention and a perceptron, each with its norm and its way around."""

    def __init__(self, name: str, dim: int, heads: int, **options: object) -> None:
        super().__init__()
        self.attention = attlas.make(name, dim=dim, heads=heads, causal=True, **options)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class Language(nn.Module):
    """A model of `sentences`."""

    def __init__(
        self, name: str, *, dim: int = 48, heads: int = 4, layers: int = 2, **options: object
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, dim)
        self.blocks = nn.ModuleList(
            Block(name, dim, heads, layer_idx=i, **options) for i in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, VOCABULARY)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embed(text)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, text: Tensor) -> Tensor:
        return cross_entropy(self(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    def maps(self, text: Tensor) -> list[Tensor]:
        """Every layer's attention map."""
        x, found = self.embed(text), []
        for block in self.blocks:
            found.append(block.attention.weights(block.norms[0](x)))
            x = block(x)
        return found


def train(
    name: str, *, steps: int = 250, batch: int = 16, length: int = 48, rate: float = 3e-3,
    seed: int = 0, each: Callable[[Language, int], None] | None = None, **options: object,
) -> Language:  # fmt: skip
    """The model after training; the same start and the same batches whatever the mechanism."""
    torch.manual_seed(seed)
    model, generator = Language(name, **options), torch.Generator().manual_seed(seed + 100)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20)
        optimiser.zero_grad()
        model.loss(sentences(batch, length, generator)).backward()
        optimiser.step()
        if each is not None:
            each(model, step)
    return model.eval()


@torch.no_grad()
def held_out(model: Language, *, length: int = 48, batch: int = 64) -> float:
    """Loss on sentences that no training saw."""
    return float(model.loss(sentences(batch, length, torch.Generator().manual_seed(2))))
