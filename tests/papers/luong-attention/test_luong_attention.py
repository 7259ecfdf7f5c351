"""luong-attention: global and local alignment; sequences reversed by an encoder-decoder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import attlas
from attlas.contract.measure import subject_of
from attlas.contract.run import results_of


@pytest.mark.parametrize("alignment", ["monotonic", "predictive"])
@pytest.mark.parametrize("scoring", ["dot", "general", "concat"])
def test_luong_attention_is_global_in_a_window_that_covers_all(
    alignment: str, scoring: str
) -> None:
    options = {"dim": 8, "scoring": scoring}
    wide = attlas.make("luong-attention", alignment=alignment, window=100, sigma=1e9, **options)
    plain = attlas.make("luong-attention", **options).double()
    plain.load_state_dict(wide.double().state_dict(), strict=False)
    x, source = torch.randn(2, 5, 8).double(), torch.randn(2, 9, 8).double()
    torch.testing.assert_close(wide(x, source), plain(x, source))


def test_luong_attention_monotonic_looks_at_the_window_around_t() -> None:
    layer = attlas.make("luong-attention", dim=8, alignment="monotonic", window=2)
    weights = layer.weights(torch.randn(1, 7, 8), torch.randn(1, 9, 8))[0, 0]
    near = (torch.arange(9) - torch.arange(7)[:, None]).abs() <= 2
    assert (weights[~near] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(7))


def test_luong_attention_predictive_multiplies_by_the_gaussian() -> None:
    layer = attlas.make("luong-attention", dim=8, alignment="predictive", window=4).double()
    nn.init.zeros_(layer.v_p.weight)  # p = S / 2
    x, source = torch.randn(1, 3, 8).double(), torch.randn(1, 10, 8).double()
    away = torch.arange(10.0, dtype=torch.float64) - 5
    scores = (layer.q_proj(x) @ source.mT)[0].masked_fill(away.abs() > 4, -torch.inf)
    wanted = scores.softmax(-1) * torch.exp(-away.square() / (2 * 2.0**2))
    torch.testing.assert_close(layer.weights(x, source)[0, 0], wanted)


@pytest.mark.parametrize("options", [
    {"scoring": "dot"}, {"scoring": "concat"}, {"alignment": "predictive"},
    {"alignment": "monotonic", "window": 2},
])  # fmt: skip
def test_luong_attention_variants_keep_the_contract(options: dict[str, str]) -> None:
    subject = subject_of("luong-attention")
    varied = replace(subject, example={**subject.example, **options})
    assert [r for r in results_of(varied) if r.status == "failed"] == []


WORDS, LENGTH = 10, 12


class Translator(nn.Module):
    """LSTM to LSTM; the attentional state is fed into the decoder's next input."""

    def __init__(self, attends: bool, dim: int = 48) -> None:
        super().__init__()
        self.read, self.hear = nn.Embedding(WORDS, dim), nn.Embedding(WORDS + 1, dim)
        self.encoder = nn.LSTM(dim, dim // 2, batch_first=True, bidirectional=True)
        self.decoder = nn.LSTMCell(2 * dim, dim)
        self.attention = attlas.make("luong-attention", dim=dim) if attends else None
        self.say = nn.Linear(dim, WORDS)

    def forward(self, source: Tensor, given: Tensor | None = None) -> Tensor:
        """Logits, each after the given words, or after those said before."""
        states, last = self.encoder(self.read(source))
        h, c = (both.transpose(0, 1).flatten(1) for both in last)
        fed, word, said = torch.zeros_like(h), torch.full_like(source[:, 0], WORDS), []
        for t in range(source.shape[1]):
            h, c = self.decoder(torch.cat((self.hear(word), fed), dim=-1), (h, c))
            if self.attention is not None:
                fed = self.attention(h[:, None], states)[:, 0]
            said.append(self.say(h if self.attention is None else fed))
            word = said[-1].argmax(-1) if given is None else given[:, t]
        return torch.stack(said, dim=1)


def _reversing(attends: bool, steps: int = 500) -> tuple[float, float]:
    """Shares of words that are right after the right ones, and after its own."""
    model = Translator(attends)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    slower = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, steps)
    for _ in range(steps):
        source = torch.randint(WORDS, (64, LENGTH))
        wanted = source.flip(1)
        loss = nn.functional.cross_entropy(model(source, wanted).flatten(0, 1), wanted.flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        slower.step()
    source = torch.randint(WORDS, (512, LENGTH))
    wanted = source.flip(1)
    with torch.no_grad():
        said = model(source, wanted), model(source)
    told, free = (float((logits.argmax(-1) == wanted).float().mean()) for logits in said)
    return told, free


def test_luong_attention_reverses_sequences() -> None:
    told, free = _reversing(attends=True)
    assert told > 0.99
    assert free > 0.97


def test_luong_attention_reverses_sequences_that_states_alone_do_not() -> None:
    told, free = _reversing(attends=False)
    assert told < 0.95
    assert free < 0.9


@pytest.mark.parametrize("scoring", ["general", "concat"])
def test_a_source_of_another_width_is_read_as_it_is(scoring: str) -> None:
    layer = attlas.make("luong-attention", dim=6, context_dim=9, scoring=scoring).double()
    x, source = torch.randn(2, 3, 6).double(), torch.randn(2, 5, 9).double()
    weights = layer.weights(x, source)
    context = weights[:, 0] @ source
    expected = layer.o_proj(torch.cat((context, x), dim=-1)).tanh()
    torch.testing.assert_close(layer(x, source), expected)
    with pytest.raises(ValueError, match=r"context must be \[batch, tokens, 9\]"):
        layer(x, x)
    with pytest.raises(ValueError, match="context must be given: Luong reads tokens 9 wide"):
        layer(x)
    with pytest.raises(ValueError, match="scoring='dot' takes a source as wide as dim=6, got 9"):
        attlas.make("luong-attention", dim=6, context_dim=9, scoring="dot")
