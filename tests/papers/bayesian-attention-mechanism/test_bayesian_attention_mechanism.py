"""bayesian-attention-mechanism: a learned prior over distances that goes on beyond the training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import attlas
from attlas import ops
from seeds import generator, mean_over_seeds

SYMBOLS = 16


def _layer(**options):
    torch.manual_seed(0)
    name = "bayesian-attention-mechanism"
    return attlas.make(name, **{"dim": 32, "heads": 4, "causal": True, **options}).double()


def _like(layer, position: str):
    plain = attlas.make("softmax", dim=32, heads=4, causal=True, position=position).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    return plain


def test_bayesian_attention_mechanism_with_a_flat_prior_has_no_positions() -> None:
    layer, x = _layer(), torch.randn(2, 33, 32, dtype=torch.float64)
    nn.init.zeros_(layer.position_encoding.shape)
    assert float((layer(x) - _like(layer, "none")(x)).detach().abs().max()) < 1e-6


def test_bayesian_attention_mechanism_with_beta_one_is_alibi_with_slope_one_over_alpha() -> None:
    layer, x = _layer(), torch.randn(2, 33, 32, dtype=torch.float64)
    alpha = torch.tensor([1.5, 7.0, 40.0, 300.0])
    with torch.no_grad():
        layer.position_encoding.scale.copy_(-alpha.log())
    alibi = _like(layer, "alibi")
    alibi.position_encoding.slopes.copy_(1 / alpha)
    assert float((layer(x) - alibi(x)).detach().abs().max()) < 1e-6


@pytest.mark.parametrize("heads", [4, 6])
def test_bayesian_attention_mechanism_starts_as_alibi(heads: int) -> None:
    prior = _layer(heads=heads, dim=8 * heads).position_encoding
    slopes = attlas.positions.ALiBi(heads).slopes.double()
    torch.testing.assert_close(prior.scale.exp(), slopes, check_dtype=False, atol=1e-7, rtol=1e-6)
    assert (prior.shape == 1).all()
    assert (prior.loc == 0).all()


def test_bayesian_attention_mechanism_prior_is_a_generalised_gaussian() -> None:
    prior = _layer().position_encoding
    with torch.no_grad():
        prior.loc.copy_(torch.tensor([0.0, -0.5, 0.3, -1.0]))
        prior.shape.copy_(torch.tensor([0.5, 1.0, 2.0, 3.0]))
    loc, shape, scale = (p.detach() for p in (prior.loc, prior.shape, prior.scale))
    zeros = torch.zeros(1, 4, 9, 9, dtype=torch.float64)
    ours = prior.score_mod(zeros, *ops.indices(zeros, 0))[0]
    for h in range(4):
        mu, beta = 2 * math.sinh(loc[h]), float(shape[h])
        alpha = float(scale[h].exp()) ** (-1 / beta)
        for q, k in ((0, 0), (8, 2), (3, 7)):
            wanted = -((abs(k - q - mu) / alpha) ** beta)
            assert ours[h, q, k].item() == pytest.approx(wanted, abs=1e-3, rel=1e-4)
    # Its mode lies where the location says: two and a third tokens before the query.
    assert ours[3, 8].argmax() == 6


def test_bayesian_attention_mechanism_trains_its_location_unless_told_not_to() -> None:
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    for trained in (True, False):
        layer = _layer(train_loc=trained)
        layer(x).square().sum().backward()
        assert (layer.position_encoding.loc.grad is not None) == trained


def test_bayesian_attention_mechanism_gradients_on_the_route_of_long_sequences() -> None:
    """400 tokens go through in chunks; the prior's gradients are those of the definition."""
    layer, x = _layer(), torch.randn(1, 400, 32, dtype=torch.float64)
    found = []
    for y in (layer(x), _by_definition(layer, x)):
        layer.zero_grad()
        y.square().sum().backward()
        found.append([p.grad.clone() for p in layer.position_encoding.parameters()])
    torch.testing.assert_close(*found)


def _by_definition(layer, x: Tensor) -> Tensor:
    q, k, v, inputs = layer.prepare(x)
    return layer.output(layer.aggregate(layer.weigh(q, k, inputs), v, inputs), inputs)


class _Model(nn.Module):
    def __init__(self, name: str, **options) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS + 1, 32)
        self.layers = nn.ModuleList(
            attlas.make(name, dim=32, heads=4, causal=True, **options) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(32) for _ in range(2))
        self.head = nn.Linear(32, SYMBOLS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + layer(norm(x))
        return self.head(x[:, -1])


def _passkeys(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random symbols; a mark is followed by the passkey, and a mark at the end asks for it."""
    tokens = torch.randint(0, SYMBOLS, (rows, length), generator=generator)
    at = torch.randint(0, length - 2, (rows,), generator=generator)
    tokens[torch.arange(rows), at] = tokens[:, -1] = SYMBOLS
    return tokens, tokens[torch.arange(rows), at + 1]


def _retrieval(name: str, lengths: tuple[int, ...], **options) -> list[float]:
    """Trained on 16 tokens: the share of passkeys named right at these lengths."""
    data = generator()
    model = _Model(name, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(350):
        tokens, wanted = _passkeys(64, 16, data)
        loss = nn.functional.cross_entropy(model(tokens), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    shares = []
    for length in lengths:
        tokens, wanted = _passkeys(128, length, generator(apart=1))
        with torch.no_grad():
            shares.append(float((model(tokens).argmax(-1) == wanted).float().mean()))
    return shares


@pytest.mark.parametrize("others", ["rope", "sinusoidal"])
def test_bayesian_attention_mechanism_retrieves_a_passkey_where_others_fail(others: str) -> None:
    # Measured (1 and 2 threads, float32 and float64): rope 1.00 then 0.05-0.06, sinusoidal 1.00
    # then 0.13-0.16.
    trained, beyond = mean_over_seeds(lambda: _retrieval("softmax", (16, 256), position=others))
    assert trained > 0.95  # it has learnt the task
    assert beyond < 0.3  # measured 0.11 and 0.08 at 16 times the length; chance is 0.06


def test_bayesian_attention_mechanism_retrieves_a_passkey_far_beyond_its_training() -> None:
    # Measured (1 and 2 threads, float32 and float64): 1.00 at every length.
    trained, beyond, far_beyond = mean_over_seeds(
        lambda: _retrieval("bayesian-attention-mechanism", (16, 256, 512))
    )
    assert trained > 0.95
    assert beyond > 0.9  # measured 1.0 and 0.98 at 16 and 32 times the length
    assert far_beyond > 0.85
