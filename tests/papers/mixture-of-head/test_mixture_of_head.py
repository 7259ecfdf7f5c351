"""mixture-of-head: gates over heads, their balance, and the conversion of a trained layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import attlas
from attlas.tasks.text import shakespeare

X = torch.randn(2, 11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _layer(**options):
    return attlas.make("mixture-of-head", **{"dim": 32, "heads": 8, **options}).double().eval()


def _gates(layer, x: Tensor = X) -> Tensor:
    return layer.head_gates(layer.prepare(x)[-1])


def test_mixture_of_head_with_every_gate_one_is_multi_head_attention() -> None:
    layer = _layer(routed_active=4, causal=True)
    plain = attlas.make("softmax", dim=32, heads=8, causal=True).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    with torch.no_grad():
        for router in (layer.router, layer.shared_router, layer.balance):
            router.weight.zero_()
    assert torch.equal(_gates(layer), torch.ones(2, 11, 8, dtype=torch.float64))
    assert torch.equal(layer(X), plain(X))


def test_mixture_of_head_keeps_the_shared_and_the_largest_routed_heads() -> None:
    layer = _layer()
    gates = _gates(layer)
    assert (gates[..., :4] > 0).all()
    assert ((gates[..., 4:] > 0).sum(-1) == 2).all()
    torch.testing.assert_close(gates[..., 4:] > 0, _largest(layer.router(X)))
    first, second = (2 * layer.balance(X).softmax(-1)).unbind(-1)
    torch.testing.assert_close(gates[..., :4].sum(-1), 4 * first)
    torch.testing.assert_close(gates[..., 4:].sum(-1), 2 * second)


def _largest(logits: Tensor) -> Tensor:
    return logits >= logits.sort(-1).values[..., -2:-1]


def test_mixture_of_head_without_shared_or_without_routed_heads() -> None:
    routed, shared = _layer(shared_heads=0, routed_active=3), _layer(shared_heads=8)
    torch.testing.assert_close(_gates(routed).sum(-1), torch.full((2, 11), 3.0).double())
    torch.testing.assert_close(_gates(shared).sum(-1), torch.full((2, 11), 8.0).double())
    assert _layer(shared_heads=1)(X).isfinite().all()
    for options in (
        {"shared_heads": 9},
        {"routed_active": 5},
        {"routed_active": 0},
        {"router": "x"},
    ):
        with pytest.raises((ValueError, TypeError), match=next(iter(options))):
            _layer(**options)


def test_mixture_of_head_balance_loss() -> None:
    """K = 2 where all heads are used alike, more where two heads take all; padding has no say."""
    layer = _layer(load_balance=0.01).train()
    x = torch.eye(32, dtype=torch.float64)[None, :4]
    with torch.no_grad():
        turns = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1.0]])
        layer.router.weight[:, :4] = turns.double().T
    layer(x)
    assert layer.auxiliary_loss.item() == pytest.approx(0.02)
    p = torch.tensor([1.0, 1, 0, 0]).softmax(0)
    valid = torch.tensor([[True, False, False, False]])
    layer(x, mask=valid)
    assert layer.auxiliary_loss.item() == pytest.approx(0.01 * 4 * (p[0] + p[1]).item())
    layer.auxiliary_loss.backward()
    assert layer.router.weight.grad.abs().sum() > 0
    layer.eval()(x)
    assert layer.auxiliary_loss is None


def test_mixture_of_head_learned_routers_all_get_gradients() -> None:
    layer = _layer()
    layer(X).square().sum().backward()
    for router in (layer.router, layer.shared_router, layer.balance):
        assert (router.weight.grad.abs().sum(-1) > 0).all()


def test_mixture_of_head_by_query_norms() -> None:
    """Gates are 0 and 1, follow the lengths of the queries, and hand on the gradient of softmax."""
    layer = _layer(router="query-norm", bias=True)
    gates = _gates(layer)
    norms = layer.q_proj(X).view(2, 11, 8, 4).norm(dim=-1)
    wanted = torch.cat((torch.ones(2, 11, 4), _largest(norms[..., 4:])), dim=-1)
    assert torch.equal(gates, wanted.double())
    p = (norms[..., 4:] / norms[..., 4:].std(-1, keepdim=True)).softmax(-1)
    mix = torch.randn_like(p)
    theirs, ours = (
        torch.autograd.grad((mix * g).sum(), layer.q_proj.weight, retain_graph=True)[0]
        for g in (p, gates[..., 4:])
    )
    torch.testing.assert_close(ours, theirs)
    alike = torch.zeros(1, 3, 32, dtype=torch.float64, requires_grad=True)
    layer(alike).sum().backward()
    assert alike.grad.isfinite().all()


class _Model(nn.Module):
    """Two layers over characters, as small as learns something."""

    def __init__(self, name: str, **options) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 48)
        self.layers = nn.ModuleList(
            attlas.make(name, dim=48, heads=8, causal=True, position="rope", **options)
            for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(48) for _ in range(5))
        self.feeds = nn.ModuleList(
            nn.Sequential(nn.Linear(48, 128), nn.GELU(), nn.Linear(128, 48)) for _ in range(2)
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for i, (layer, feed) in enumerate(zip(self.layers, self.feeds, strict=True)):
            x = x + layer(self.norms[2 * i](x))
            x = x + feed(self.norms[2 * i + 1](x))
        return self.norms[4](x) @ self.embed.weight.T / 48**0.5


def _windows(ids: Tensor, count: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(len(ids) - 65, (count,), generator=generator)
    return ids[starts[:, None] + torch.arange(65)]


def _loss(model: _Model, batch: Tensor) -> Tensor:
    return cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def _train(model: _Model, ids: Tensor, steps: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for _ in range(steps):
        loss = _loss(model, _windows(ids, 16, generator))
        for layer in model.layers:
            loss = loss + (0 if layer.auxiliary_loss is None else layer.auxiliary_loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_mixture_of_head_converted_from_a_trained_model_keeps_its_loss() -> None:
    """75% of the heads, tuned as long as the dense model goes on: within 3% of its loss."""
    ids = torch.tensor([min(ord(c), 127) for c in shakespeare()[:200_000]])
    held_out = _windows(ids[180_000:], 64, torch.Generator().manual_seed(2))
    dense = _Model("softmax")
    _train(dense, ids[:180_000], 240, 3e-3)
    sparse = _Model("mixture-of-head", router="query-norm")
    missing, unknown = sparse.load_state_dict(dense.state_dict(), strict=False)
    assert not missing, "the conversion adds no parameter"
    assert not unknown
    for ours, theirs in zip(sparse.layers, dense.layers, strict=True):
        assert ours.load_from(theirs.state_dict()) == []
    with torch.no_grad():
        before, converted = _loss(dense, held_out).item(), _loss(sparse, held_out).item()
    for model in (dense, sparse):
        _train(model, ids[:180_000], 60, 1e-3)
    sparse.eval()
    with torch.no_grad():
        wanted, after = _loss(dense, held_out).item(), _loss(sparse, held_out).item()
        inputs = sparse.layers[0].prepare(sparse.embed(held_out[:, :-1]))[-1]
        assert sparse.layers[0].head_gates(inputs).mean().item() == 0.75
    print(f"dense {before:.3f} and {wanted:.3f}, converted {converted:.3f} and {after:.3f}")
    assert wanted < 2.6, "the dense model has learnt something"
    assert converted > 1.005 * before, "switching heads off does cost something at first"
    assert after < 1.03 * wanted
