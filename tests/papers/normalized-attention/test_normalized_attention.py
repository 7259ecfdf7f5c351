"""normalized-attention: rows of z are standardised, and argmin, first token, argmax are learned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import attlas
from attlas import masks
from seeds import generator, mean_over_seeds


def _layer(**options):
    made = attlas.make("normalized-attention", **{"dim": 32, "heads": 4, **options}).double()
    with torch.no_grad():
        made.gain.copy_(torch.tensor([1.0, 2.0, -0.5, 0.3])[: made.heads, None, None])
        made.shift.copy_(torch.tensor([0.0, 0.1, 0.2, -0.4])[: made.heads, None, None])
    return made.eval()


@pytest.mark.parametrize("pattern", [None, masks.causal, masks.window(4)])
def test_normalized_attention_rows_have_mean_0_and_unit_variance(pattern) -> None:
    layer = _layer(mask=pattern, eps=1e-12)
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    z = (layer.weights(x) - layer.shift) / layer.gain
    seen = torch.ones(1, 1, 11, 11, dtype=torch.bool)
    if pattern is not None:
        seen = masks.dense(pattern, 11, 11)
    n, z = seen.sum(-1), z * seen
    zero = torch.zeros(2, 4, 11, dtype=torch.float64)
    torch.testing.assert_close(z.sum(-1) / n, zero, atol=1e-9, rtol=0)
    # A row of one key has nothing to vary.
    wanted = (n > 1).to(z).expand(2, 4, 11)
    torch.testing.assert_close(z.square().sum(-1) / n, wanted, atol=1e-6, rtol=0)


def test_normalized_attention_epsilon_stands_outside_the_root() -> None:
    layer = _layer(dim=4, heads=1, eps=0.5)
    scores = torch.tensor([[[[1.0, 3.0, -torch.inf]]]], dtype=torch.float64)
    inputs = layer.prepare(torch.randn(1, 1, 4).double())[-1]
    wanted = torch.tensor([-1 / 1.5, 1 / 1.5, 0.0]).double()
    torch.testing.assert_close(layer.normalize(scores, inputs)[0, 0, 0], wanted)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("position", [None, "rope", "alibi"])
def test_normalized_attention_by_sums_is_by_the_map(kv_heads: int, position) -> None:
    layer = _layer(kv_heads=kv_heads, position=position)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    valid = torch.tensor([[False] * 3 + [True] * 6, [True] * 8 + [False]])
    for mask in (None, valid):
        q, k, v, inputs = layer.prepare(x, mask=mask)
        wanted = layer.aggregate(layer.weigh(q, k, inputs), v, inputs)
        torch.testing.assert_close(layer.attend(q, k, v, inputs), wanted)


def test_normalized_attention_without_a_mask_takes_linear_memory() -> None:
    from attlas.contract.layers.numbers import LargestTensor

    layer, sizes = _layer(), []
    for tokens in (512, 1024):
        with torch.no_grad(), LargestTensor() as seen:
            layer(torch.zeros(1, tokens, 32, dtype=torch.float64))
        sizes.append(seen.elements)
    assert sizes[1] <= 2.1 * sizes[0]


@pytest.mark.parametrize("name", ["sum", "max"])
@pytest.mark.parametrize("pattern", [None, masks.causal, masks.window(3)])
def test_normalized_attention_baselines_pool_what_is_visible(name: str, pattern) -> None:
    layer = attlas.make(f"{name}-pooling", dim=6, heads=2, mask=pattern)
    x, seen = torch.randn(2, 7, 6), torch.ones(7, 7, dtype=torch.bool)
    if pattern is not None:
        seen = masks.dense(pattern, 7, 7)[0, 0]
    rows = [x[:, row] for row in seen]
    wanted = torch.stack([r.sum(1) if name == "sum" else r.amax(1) for r in rows], dim=1)
    torch.testing.assert_close(layer(x), wanted)
    for option in ({"bias": True}, {"kv_heads": 1}, {"head_dim": 5}, {"position": "rope"}):
        with pytest.raises(ValueError, match=next(iter(option))):
            attlas.make(f"{name}-pooling", dim=6, heads=2, **option)


def _cases(length: int, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The smallest of 100 numbers where 64 is among them, the first where 50 is, else the largest."""
    x = torch.randint(98, (batch, length), generator=generator)
    x = x + (x >= 50).long()
    x = x + (x >= 64).long()
    case, rows = torch.arange(batch) % 3, torch.arange(batch)
    at = torch.randint(length, (batch,), generator=generator)
    x[rows, at] = torch.where(case == 0, 64, torch.where(case == 1, 50, x[rows, at]))
    first = torch.zeros_like(at)
    return x, torch.where(case == 0, x.argmin(1), torch.where(case == 1, first, x.argmax(1)))


class _Model(nn.Module):
    """The paper's block: norms inside the ways around, every number scored by itself."""

    def __init__(self, length: int, dim: int = 48, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(100, dim), nn.Embedding(length, dim)
        self.attentions = nn.ModuleList(
            attlas.make("normalized-attention", dim=dim, heads=heads, bias=True)
            for _ in range(layers)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.LayerNorm(4 * dim), nn.GELU(),
                          nn.Linear(4 * dim, dim)) for _ in range(layers)
        )  # fmt: skip
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * layers))
        self.head = nn.Linear(dim, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.place.weight
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + self.norms[2 * i](attention(x))
            x = x + self.norms[2 * i + 1](mlp(x))
        return self.head(x)[..., 0]


def _right(length: int, steps: int = 400) -> float:
    """Share of new cases answered right after so many steps."""
    model = _Model(length)
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    data = generator()
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        x, y = _cases(length, 33, data)
        optimiser.zero_grad()
        cross_entropy(model(x), y).backward()
        optimiser.step()
    x, y = _cases(length, 999, data)
    with torch.no_grad():
        return float((model(x).argmax(-1) == y).float().mean())


@pytest.mark.parametrize("length", [8, 32])
def test_normalized_attention_learns_argmin_first_and_argmax(length: int) -> None:
    """At both lengths; that softmax attention does worse on longer ones is not claimed here."""
    # Measured 0.95, 0.87, 0.97, 0.89 at length 8 and 0.89, 0.94, 0.97, 0.92 at 32: one thread in float32
    # and in float64, then two. A single run was at 0.81 at the least, at either length.
    assert mean_over_seeds(lambda: _right(length)) > 0.7
