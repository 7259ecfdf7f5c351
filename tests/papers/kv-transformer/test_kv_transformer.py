"""kv-transformer: symmetric logits, the positions that break the symmetry, and sorting with both."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import attlas

X = torch.randn(2, 11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _layer(**options):
    return attlas.make("kv-transformer", dim=32, heads=4, **options).double().eval()


def _logits(layer) -> Tensor:
    q, k, _, inputs = layer.prepare(X)
    return layer.score(q, k, inputs)


def test_kv_transformer_logits_are_symmetric_without_positions_alone() -> None:
    plain, positional = _logits(_layer()), _logits(_layer(position_dim=10))
    torch.testing.assert_close(plain, plain.mT, atol=1e-6, rtol=0)
    assert (positional - positional.mT).abs().max() > 0.1


def test_kv_transformer_has_two_thirds_of_the_input_projections() -> None:
    ours, theirs = (
        sum(p.numel() for n, p in layer.named_parameters() if n[:2] in ("q_", "k_", "v_"))
        for layer in (_layer(), attlas.make("softmax", dim=32, heads=4))
    )
    assert ours * 3 == theirs * 2


@pytest.mark.parametrize("m", [1, 3, 4, 10])
def test_kv_transformer_positional_logits_by_the_definition(m: int) -> None:
    """Every logit becomes a vector, gets the pair's features, and is mapped back to a number."""
    layer = _layer(position_dim=m)
    width = 2 * math.ceil(m / 4)
    waves = torch.zeros(11, width, dtype=torch.float64)
    for at in range(11):
        for pair in range(width // 2):
            angle = at / 10000 ** (2 * pair / width)
            waves[at, 2 * pair], waves[at, 2 * pair + 1] = math.sin(angle), math.cos(angle)
    features = torch.cat(
        (waves[:, None].expand(11, 11, -1), waves[None].expand(11, 11, -1)), dim=-1
    )[..., :m]
    k = layer.k_proj(X).view(2, 11, 4, 8).transpose(1, 2)
    s = k @ k.mT / 8**0.5
    wanted = layer.pair_map(s[..., None] + features)[..., 0]
    torch.testing.assert_close(_logits(layer), wanted, atol=1e-9, rtol=1e-9)


def test_kv_transformer_positional_form_honours_padding_and_decoding() -> None:
    layer = _layer(position_dim=10, causal=True)
    whole, cache = layer(X), layer.init_cache()
    steps = [layer(part, cache=cache) for part in X.split([4, 3, 1, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)
    valid = torch.tensor([False] * 2 + [True] * 11).expand(2, -1)
    padded = layer(torch.cat((7 * torch.ones_like(X[:, :2]), X), dim=1), mask=valid)
    torch.testing.assert_close(padded[:, 2:], whole)


def test_kv_transformer_refuses_grouped_keys() -> None:
    for options in ({"kv_heads": 2}, {"position_dim": -1}):
        with pytest.raises((ValueError, TypeError), match=next(iter(options))):
            _layer(**options)


class _Model(nn.Module):
    """An encoder over digits that stand at learned positions."""

    def __init__(self, name: str, tokens: int, **options: int) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(10, 64), nn.Parameter(torch.randn(tokens, 64) * 0.1)
        self.layers = nn.ModuleList(attlas.make(name, dim=64, heads=4, **options) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(5))
        self.feeds = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(2)
        )
        self.out = nn.Linear(64, 10)

    def forward(self, digits: Tensor) -> Tensor:
        x = self.embed(digits) + self.places
        for i, (layer, feed) in enumerate(zip(self.layers, self.feeds, strict=True)):
            x = x + layer(self.norms[2 * i](x))
            x = x + feed(self.norms[2 * i + 1](x))
        return self.out(self.norms[4](x))


TASKS = {
    "sort": lambda digits: digits.sort(-1).values,
    "reverse": lambda digits: digits.flip(-1),
    "swap": lambda digits: digits.roll(digits.shape[-1] // 2, -1),
}


def _accuracy(name: str, task: str, steps: int, **options: int) -> float:
    """Share of right digits among 500 new lists of 12, after so many steps on 64."""
    torch.manual_seed(0)
    model = _Model(name, 12, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        digits = torch.randint(10, (64, 12))
        loss = cross_entropy(model(digits).flatten(0, 1), TASKS[task](digits).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    digits = torch.randint(10, (500, 12))
    with torch.no_grad():
        return float((model.eval()(digits).argmax(-1) == TASKS[task](digits)).float().mean())


FORMS = {"qkv": ("softmax", {}), "kv": ("kv-transformer", {}),
         "kv+pos": ("kv-transformer", {"position_dim": 10})}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("form", FORMS)
def test_kv_transformer_sorts_reverses_and_swaps(form: str, task: str) -> None:
    """Over 95% of the digits right, as the same model with queries has."""
    name, options = FORMS[form]
    reached = _accuracy(name, task, 300, **options)
    print(f"{form} {task} {reached:.4f}")
    assert reached > 0.95
