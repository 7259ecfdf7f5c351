"""minimal-transformer: one matrix for two, its symmetric half, and digits with few parameters."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import attlas
from attlas.tasks.train.digits import images

X = torch.randn(2, 11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _layer(heads: int = 4, **options):
    return attlas.make("minimal-transformer", dim=32, heads=heads, **options).double().eval()


def _scores(layer) -> Tensor:
    q, k, _, inputs = layer.prepare(X)
    return layer.score(q, k, inputs)


@pytest.mark.parametrize("heads", [1, 4])
def test_minimal_transformer_scores_are_those_of_two_matrices(heads: int) -> None:
    layer = _layer(heads, values=True)
    plain = attlas.make("softmax", dim=32, heads=heads).double()
    w_q, w_k = (p.weight.view(heads, -1, 32) for p in (plain.q_proj, plain.k_proj))
    with torch.no_grad():
        # x A xᵀ with A = W_Q W_Kᵀ; nn.Linear holds the transpose of each.
        layer.similarity.weight.copy_((w_k.mT @ w_q).flatten(0, 1))
        for name in ("v_proj", "o_proj"):
            getattr(layer, name).weight.copy_(getattr(plain, name).weight)
    torch.testing.assert_close(_scores(layer), _scores(plain), atol=1e-6, rtol=0)
    torch.testing.assert_close(layer(X), plain(X), atol=1e-6, rtol=0)


@pytest.mark.parametrize("position", [None, "rope"])
def test_minimal_transformer_symmetric_scores(position: str | None) -> None:
    symmetric = _scores(_layer(symmetric=True, position=position))
    torch.testing.assert_close(symmetric, symmetric.mT, atol=1e-9, rtol=0)
    assert (
        _scores(_layer(position=position)) - _scores(_layer(position=position)).mT
    ).abs().max() > 1


@pytest.mark.parametrize("heads", [1, 4])
def test_minimal_transformer_symmetric_is_softmax_attention_with_queries_as_keys(
    heads: int,
) -> None:
    """One matrix of dim² numbers serves as W_Q and W_K of however many heads."""
    layer = _layer(heads, symmetric=True, values=True, position="rope")
    plain = attlas.make("softmax", dim=32, heads=heads, position="rope").double()
    weights = layer.state_dict()
    plain.load_state_dict(weights | {"k_proj.weight": weights["q_proj.weight"]})
    torch.testing.assert_close(layer(X), plain(X))
    bare = attlas.make("minimal-transformer", dim=64, heads=heads, symmetric=True)
    assert sum(p.numel() for p in bare.parameters()) == 64 * 64


def test_minimal_transformer_without_values_mixes_slices_of_the_input() -> None:
    layer = _layer()
    weights = layer.weights(X)
    wanted = torch.cat([weights[:, h] @ X[..., 8 * h : 8 * h + 8] for h in range(4)], dim=-1)
    torch.testing.assert_close(layer(X), wanted)
    assert [name for name, _ in layer.named_parameters()] == ["similarity.weight"]


def test_minimal_transformer_refuses_heads_that_are_no_slices() -> None:
    for options in ({"kv_heads": 2}, {"head_dim": 4}):
        with pytest.raises(ValueError, match=next(iter(options))):
            _layer(**options)


class _Classifier(nn.Module):
    """Digits cut into 2 × 2 patches: two layers, with or without feed-forward parts, and a mean."""

    def __init__(self, name: str, feeds: bool, **options: object) -> None:
        super().__init__()
        self.embed, self.places = nn.Linear(4, 32), nn.Parameter(torch.randn(16, 32) * 0.3)
        self.layers = nn.ModuleList(attlas.make(name, dim=32, **options) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.feeds = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
            for _ in range(2 if feeds else 0)
        )
        self.out = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 10))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = pixels[:, 0].unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)
        x = self.embed(patches) + self.places
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            x = x + layer(norm(x))
            if self.feeds:
                x = x + self.feeds[i](x)
        return self.out(x.mean(1))


def _accuracy(name: str, feeds: bool, rate: float, **options: object) -> tuple[float, int]:
    """Share of right classes among the 359 digits kept back, and how many parameters.

    Trained for 450 steps on images with noise, without which both learn the training set by heart.
    """
    torch.manual_seed(0)
    model = _Classifier(name, feeds, **options)
    pixels, classes = images("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=450)
    for _ in range(450):
        chosen = torch.randint(len(classes), (64,))
        noisy = pixels[chosen] + 0.3 * torch.randn(64, 1, 8, 8)
        loss = cross_entropy(model(noisy), classes[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    pixels, classes = images("test")
    with torch.no_grad():
        right = (model.eval()(pixels).argmax(-1) == classes).float().mean()
    return right.item(), sum(p.numel() for p in model.parameters())


def test_minimal_transformer_tells_digits_with_few_parameters() -> None:
    """Under 25% of the parameters, at most 2 points below the full model."""
    pytest.importorskip("sklearn", reason="the extra `digits` is not installed")
    full, many = _accuracy("softmax", feeds=True, rate=3e-3, heads=4)
    reached, few = _accuracy("minimal-transformer", feeds=False, rate=1e-2, heads=2)
    print(f"full: {full:.4f} with {many} parameters; minimal: {reached:.4f} with {few}")
    assert few < 0.25 * many
    assert full > 0.95
    assert reached > full - 0.02
