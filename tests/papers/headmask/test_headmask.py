"""headmask: which heads are off, what is felt of it, and how even the heads become."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import attlas
from attlas.layers.heads.headmask import measuring

X = torch.randn(3, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CHOICES = ("random", "importance")


def _layer(**options):
    return attlas.make("headmask", **{"dim": 32, "heads": 8, **options}).double()


def _off(layer) -> list[int]:
    """Heads whose part of the output projection got no gradient in one training pass."""
    layer.zero_grad()
    layer(X).square().sum().backward()
    felt = layer.o_proj.weight.grad.view(32, 8, 4).abs().sum((0, 2))
    return (felt == 0).nonzero().flatten().tolist()


@pytest.mark.parametrize("choice", CHOICES)
def test_headmask_is_multi_head_attention_in_evaluation(choice: str) -> None:
    layer = _layer(choice=choice, masked=3).eval()
    plain = attlas.make("softmax", dim=32, heads=8).double()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(X), plain(X))


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("masked", [0, 1, 3])
def test_headmask_switches_off_exactly_n_heads(choice: str, masked: int) -> None:
    """No output and no gradient in any of their parameters; the others are not rescaled."""
    layer = _layer(choice=choice, masked=masked).train()
    for _ in range(3):
        torch.manual_seed(int(torch.randint(100, ())))
        off = _off(layer)
        assert len(off) == masked
        for name in ("q_proj", "k_proj", "v_proj"):
            grad = getattr(layer, name).weight.grad.view(8, 4, 32).abs().sum((1, 2))
            assert (grad == 0).nonzero().flatten().tolist() == off
    heads = layer.attend(*layer.prepare(X))
    gated = heads * layer.head_gates(heads)
    on = gated.abs().sum((0, 2, 3)) > 0
    assert int(on.sum()) == 8 - masked
    assert torch.equal(gated[:, on], heads[:, on])


def test_headmask_draws_heads_evenly() -> None:
    layer = _layer(masked=2).train()
    heads = torch.ones(1, 8, 1, 1, dtype=torch.float64)
    drawn = torch.stack([layer.head_gates(heads).flatten() == 0 for _ in range(800)]).sum(0)
    assert drawn.sum() == 1600
    assert ((drawn > 140) & (drawn < 260)).all(), "200 each but for chance"


def test_headmask_switches_off_the_most_important_heads() -> None:
    """Importance is E|∂ loss / ∂ ξ| of the pass before, or of a pass of its own."""
    layer = _layer(choice="importance", masked=2).train()
    target = torch.randn_like(X)
    gates = torch.ones(3, 8, 1, 1, dtype=torch.float64, requires_grad=True)
    prepared = layer.prepare(X)
    y = attlas.Attention.output(layer, layer.attend(*prepared) * gates, prepared[-1])
    ((y - target) ** 2).mean().backward()
    wanted = gates.grad.abs().sum(0).flatten()
    with measuring(layer):
        assert len(_off(layer)) == 0
        ((layer(X) - target) ** 2).mean().backward()
    torch.testing.assert_close(layer.importance.double(), wanted, atol=1e-6, rtol=1e-5)
    assert _off(layer) == sorted(wanted.topk(2).indices.tolist())
    before = layer.importance.clone()
    assert (before > 0).all(), "heads that are off are measured too"


def test_headmask_refuses_to_switch_off_every_head() -> None:
    for options in ({"masked": 8}, {"masked": -1}, {"choice": "worst"}):
        with pytest.raises((ValueError, TypeError), match=next(iter(options))):
            _layer(**options)


class _Translator(nn.Module):
    """Encoder over a source sentence that names the target's words, place by place."""

    def __init__(self, name: str, **options: object) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(24, 48), nn.Parameter(torch.randn(10, 48) * 0.3)
        self.layers = nn.ModuleList(attlas.make(name, dim=48, heads=6, **options) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(48) for _ in range(5))
        self.feeds = nn.ModuleList(
            nn.Sequential(nn.Linear(48, 96), nn.GELU(), nn.Linear(96, 48)) for _ in range(2)
        )
        self.out = nn.Linear(48, 24)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places
        for i, (layer, feed) in enumerate(zip(self.layers, self.feeds, strict=True)):
            x = x + layer(self.norms[2 * i](x))
            x = x + feed(self.norms[2 * i + 1](x))
        return self.out(self.norms[4](x))


def _pairs(count: int) -> tuple[Tensor, Tensor]:
    """Sentences and translations: another word for each, the order reversed, and agreement.

    The first word of the source decides which of two forms every word of the target has.
    """
    source = torch.randint(12, (count, 10))
    words = (5 * source + 3) % 12
    return source, (words + 12 * (source[:, :1] % 2)).flip(1)


def _spread(name: str, **options: object) -> tuple[float, float]:
    """(loss with all heads, standard deviation of the losses without one head each)."""
    torch.manual_seed(0)
    model = _Translator(name, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(500):
        source, target = _pairs(48)
        loss = cross_entropy(model(source).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    source, target = _pairs(300)
    model.eval()
    losses = []
    with torch.no_grad():
        whole = cross_entropy(model(source).flatten(0, 1), target.flatten()).item()
        for layer in model.layers:
            for head in range(6):
                kept = layer.o_proj.weight.clone()
                layer.o_proj.weight[:, 8 * head : 8 * head + 8] = 0
                losses.append(cross_entropy(model(source).flatten(0, 1), target.flatten()))
                layer.o_proj.weight.copy_(kept)
    return whole, torch.stack(losses).std().item()


def test_headmask_makes_heads_more_alike_in_what_their_loss_costs() -> None:
    plain, uneven = _spread("softmax")
    reached = {choice: _spread("headmask", choice=choice) for choice in CHOICES}
    print(f"softmax {plain:.4f} ± {uneven:.4f}", reached)
    for whole, spread in reached.values():
        assert whole < 0.3, "it translates: by chance the loss is log 24 = 3.2"
        assert spread < 0.5 * uneven
