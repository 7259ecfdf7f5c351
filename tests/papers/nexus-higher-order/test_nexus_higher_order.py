"""nexus-higher-order: queries and keys that attended before follow two hops in one layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attlas
from seeds import mean_over_seeds


def _layer(**options):
    return attlas.make("nexus", **{"dim": 32, "heads": 4, "causal": True, **options}).double()


def test_nexus_higher_order_at_depth_zero_is_softmax_attention() -> None:
    layer = attlas.make("nexus", dim=32, heads=4, causal=True, depth=0, position="rope")
    plain = attlas.Attention(32, 4, causal=True, position="rope")
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 11, 32)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-6, rtol=0)


def test_nexus_higher_order_has_as_many_parameters_at_every_depth() -> None:
    counts = {sum(p.numel() for p in _layer(depth=m).parameters()) for m in range(4)}
    assert counts == {4 * 32 * 32}


@pytest.mark.parametrize("options", [{}, {"depth": 2}, {"depth": 2, "kv_heads": 2}])
def test_nexus_higher_order_nests_attention_of_queries_and_of_keys(options) -> None:
    layer = _layer(**options)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)

    def attended(a, b):
        return (a @ b.mT * layer.scale).masked_fill(hidden, -torch.inf).softmax(-1)

    q, k = (p(x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (layer.q_proj, layer.k_proj))
    for _ in range(layer.depth):
        q, k = attended(q, q) @ q, attended(k, k) @ k
    wanted = attended(q, k.repeat_interleave(4 // layer.kv_heads, dim=1))
    torch.testing.assert_close(layer.weights(x), wanted)


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_nexus_higher_order_is_causal_and_decodes_at_depth_three(position: str) -> None:
    layer = _layer(depth=3, position=position, kv_heads=2)
    x = torch.randn(2, 13, 32, dtype=torch.float64)
    changed = x.clone()
    changed[:, 8:] = torch.randn_like(x[:, 8:])
    torch.testing.assert_close(layer(changed)[:, :8], layer(x)[:, :8], atol=1e-12, rtol=0)
    cache = layer.init_cache()
    parts = [layer(part, cache=cache) for part in x.split([5, 4, 1, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x))


def test_nexus_higher_order_refuses_a_negative_depth() -> None:
    with pytest.raises(ValueError, match="depth"):
        _layer(depth=-1)


SYMBOLS, HOPS = 10, 6


def _two_hops(count: int, seed: int) -> tuple[torch.Tensor, ...]:
    """A ring's pairs (from, to) in any order, where to start, and what lies two steps on."""
    g = torch.Generator().manual_seed(seed)
    ring = torch.rand(count, SYMBOLS, generator=g).argsort(-1)[:, :HOPS]
    order = torch.rand(count, HOPS, generator=g).argsort(-1)
    pairs = (ring.gather(1, order), ring.roll(-1, 1).gather(1, order))
    return *pairs, ring[:, 0], ring[:, 2]


class _OneLayer(nn.Module):
    """Pairs and the query as tokens, one attention layer and nothing else, a linear reading."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.first, self.second, self.query = (nn.Embedding(SYMBOLS, 48) for _ in range(3))
        self.attention = attlas.make("nexus", dim=48, heads=1, **options)
        self.read = nn.Linear(48, SYMBOLS)

    def forward(self, first, second, query) -> torch.Tensor:
        pairs = self.first(first) + self.second(second)
        return self.read(self.attention(torch.cat((pairs, self.query(query)[:, None]), dim=1))[:, -1])


def _retrieved(depth: int, steps: int = 600) -> float:
    model = _OneLayer(depth=depth)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(steps):
        *x, y = _two_hops(64, seed=step + 10**7 * torch.initial_seed())
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(*x), y).backward()
        optimizer.step()
    *x, y = _two_hops(2000, seed=10**6)
    with torch.no_grad():
        return float((model(*x).argmax(-1) == y).float().mean())


def test_nexus_higher_order_retrieves_over_two_hops_in_one_layer() -> None:
    # Measured (1 and 2 threads, float32 and float64): 0.99-1.00, depth 0 0.35-0.37.
    assert mean_over_seeds(lambda: _retrieved(depth=1)) > 0.95
    assert mean_over_seeds(lambda: _retrieved(depth=0)) < 0.6
