"""affine-scaled-attention: softmax at α = ᾱ = 1; rows sum to α + nβ; less on the first token."""

from __future__ import annotations

import pytest
import torch

import attlas
from attlas import Attention, masks
from tiny_language import held_out, sentences, train

PATTERNS = {
    "none": None, "causal": masks.causal, "window": masks.window(3),
    "each head": masks.per_head(masks.causal, masks.window(2), masks.full, masks.causal),
}  # fmt: skip


def _layer(**options):
    made = attlas.make("affine-scaled-attention", **{"dim": 32, "heads": 4, **options}).double()
    made.mean_alpha.copy_(torch.tensor([0.1, 0.4, 0.7, 1.0])[: made.heads])
    return made.eval()


@pytest.mark.parametrize("activation", ["clip", "sigmoid"])
def test_affine_scaled_attention_with_open_gates_is_softmax(activation: str) -> None:
    layer = _layer(bias=True, causal=True, activation=activation)
    plain = Attention(32, 4, bias=True, causal=True).double()
    with torch.no_grad():
        layer.gate_proj.weight.zero_()
        layer.gate_proj.bias.fill_(5.0 if activation == "clip" else 40.0)
        layer.mean_alpha.fill_(1.0)
    plain.load_state_dict({name: layer.state_dict()[name] for name in plain.state_dict()})
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_affine_scaled_attention_rows_sum_to_alpha_and_n_beta(pattern: str) -> None:
    """By the definition, from the softmax of the same layer's scores; and so ᾱ for every row."""
    layer = _layer(mask=PATTERNS[pattern])
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    q, k, v, inputs = layer.prepare(x)
    seen = torch.ones(1, 4, 11, 11, dtype=torch.bool)
    if PATTERNS[pattern] is not None:
        seen = masks.dense(PATTERNS[pattern], 11, 11).expand(1, 4, 11, 11)
    soft = (q @ k.mT * layer.scale).masked_fill(~seen, -torch.inf).softmax(-1)
    alpha = (0.1 * (x @ layer.gate_proj.weight.T) + 0.5).clamp(0, 1).mT[..., None]
    n = seen.sum(-1, keepdim=True)
    beta = (layer.mean_alpha[:, None, None] - alpha) / n
    weights = layer.weights(x)
    torch.testing.assert_close(weights, alpha * soft + seen * beta)
    torch.testing.assert_close(weights.sum(-1, keepdim=True), alpha + n * beta)
    torch.testing.assert_close(weights.sum(-1), layer.mean_alpha[:, None].expand(2, 4, 11))
    torch.testing.assert_close(layer.attend(q, k, v, inputs), weights @ v)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_affine_scaled_attention_running_mean_is_the_definition(
    pattern: str, kv_heads: int
) -> None:
    layer = _layer(mask=PATTERNS[pattern], kv_heads=kv_heads, position="rope")
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    valid = torch.tensor([[False] * 3 + [True] * 6, [True] * 8 + [False]])
    for mask in (None, valid):
        q, k, v, inputs = layer.prepare(x, mask=mask)
        wanted = layer.aggregate(layer.weigh(q, k, inputs), v, inputs)
        torch.testing.assert_close(layer.attend(q, k, v, inputs), wanted)


def test_affine_scaled_attention_follows_alpha_while_training() -> None:
    layer = _layer(momentum=0.8)
    layer.mean_alpha.zero_()
    x = torch.randn(3, 7, 32, dtype=torch.float64)
    layer.eval()(x)
    assert (layer.mean_alpha == 0).all()
    mean = layer.alpha(x).mean((0, 2, 3)).detach()
    layer.train()(x)
    torch.testing.assert_close(layer.mean_alpha, 0.2 * mean)
    layer(x)
    torch.testing.assert_close(layer.mean_alpha, 0.36 * mean)
    # Padding does not count.
    padded, valid = torch.cat((x, 9 * torch.randn(3, 2, 32).double()), 1), torch.arange(9) < 7
    layer.mean_alpha.zero_()
    layer(padded, mask=valid.expand(3, -1))
    torch.testing.assert_close(layer.mean_alpha, 0.2 * mean)


def test_affine_scaled_attention_clips_alpha_where_the_paper_does() -> None:
    layer = _layer(dim=4, heads=1)
    with torch.no_grad():
        layer.gate_proj.weight.copy_(torch.tensor([[1.0, 0, 0, 0]]))
    x = torch.zeros(1, 5, 4, dtype=torch.float64)
    x[0, :, 0] = torch.tensor([-7.0, -5.0, 1.0, 5.0, 9.0])
    wanted = torch.tensor([0.0, 0.0, 0.6, 1.0, 1.0]).double()
    torch.testing.assert_close(layer.alpha(x)[0, 0, :, 0], wanted)


def test_affine_scaled_attention_learns_as_well_with_less_on_the_first_token() -> None:
    """As well: within 1 %. Less: rows sum to ᾱ below 1; the first token's share of them stays."""
    text = sentences(32, 48, torch.Generator().manual_seed(3))
    loss, first = {}, {}
    for name in ("softmax", "affine-scaled-attention"):
        model = train(name, steps=120, position="rope")
        loss[name] = held_out(model)
        with torch.no_grad():
            first[name] = torch.stack([m[:, :, 8:, 0].mean() for m in model.maps(text)]).mean()
    assert loss["affine-scaled-attention"] <= 1.01 * loss["softmax"]
    assert first["affine-scaled-attention"] < 0.75 * first["softmax"]


@pytest.mark.parametrize(
    ("options", "said"), [({"activation": "tanh"}, "activation"), ({"momentum": 1.5}, "momentum")]
)
def test_affine_scaled_attention_refuses(options, said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        _layer(**options)
