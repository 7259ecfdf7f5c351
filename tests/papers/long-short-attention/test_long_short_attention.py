"""long-short-attention: a window as long as the text is softmax; short heads see no further."""

from __future__ import annotations

import pytest
import torch

import attlas
from attlas import Attention, masks
from attlas.layers.weights.long_short import largest_logits
from tiny_language import Language, sentences, train

PATTERNS = {
    "none": None, "causal": masks.causal, "sinks": masks.causal & (masks.window(7) | masks.sinks(1)),
    "each head": masks.per_head(masks.causal, masks.window(5), masks.full, masks.causal),
}  # fmt: skip


def _layer(**options):
    made = attlas.make("long-short-attention", **{"dim": 32, "heads": 4, "window": 3, **options})
    return made.double()


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("causal", [False, True])
def test_long_short_attention_with_a_window_over_all_is_softmax(
    causal: bool, position: str
) -> None:
    layer = _layer(window=11, causal=causal, position=position)
    plain = Attention(32, 4, causal=causal, position=position).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("long_heads", [0, 1, 3, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_long_short_attention_short_heads_see_their_window_alone(
    pattern: str, long_heads: int
) -> None:
    layer = _layer(mask=PATTERNS[pattern], long_heads=long_heads)
    plain = Attention(32, 4, mask=PATTERNS[pattern]).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 13, 32, dtype=torch.float64)
    weights, whole = layer.weights(x), plain.weights(x)
    near = masks.dense(masks.window(3), 13, 13)[0, 0]
    assert (weights[:, long_heads:, ~near] == 0).all()
    torch.testing.assert_close(weights[:, :long_heads], whole[:, :long_heads])
    cut = whole * near
    torch.testing.assert_close(
        weights[:, long_heads:], (cut / cut.sum(-1, keepdim=True))[:, long_heads:]
    )


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("long_heads", [1, 2])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_long_short_attention_in_two_calls_is_the_map(
    pattern: str, long_heads: int, kv_heads: int
) -> None:
    layer = _layer(
        mask=PATTERNS[pattern], long_heads=long_heads, kv_heads=kv_heads, position="alibi"
    )
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    valid = torch.tensor([[False] * 3 + [True] * 6, [True] * 8 + [False]])
    pairs = torch.rand(2, 1, 9, 9) < 0.7
    for mask in (None, valid, pairs):
        q, k, v, inputs = layer.prepare(x, mask=mask)
        wanted = layer.aggregate(layer.weigh(q, k, inputs), v, inputs)
        torch.testing.assert_close(layer.attend(q, k, v, inputs), wanted)


def test_long_short_attention_logs_the_largest_visible_logit() -> None:
    """What the window hides does not count."""
    layer = _layer(causal=True, window=2, position="alibi")
    x = torch.randn(1, 300, 32, dtype=torch.float64)
    x[:, 7] *= 50  # seen by every later query of the long head, by two of the short ones'
    found = largest_logits(layer, x)
    q, k, *_ = layer.prepare(x)
    far = torch.arange(300)[:, None] - torch.arange(300)
    slopes = torch.tensor([2.0 ** (-8 * (h + 1) / 4) for h in range(4)]).double()
    scores = q @ k.mT * layer.scale - slopes[:, None, None] * far
    for head in range(4):
        seen = (far >= 0) & ((far < 2) | (head == 0))
        assert found[head].item() == pytest.approx(scores[0, head][seen].max().item())
    assert largest_logits(layer, x, mask=torch.ones(1, 300).bool()).equal(found)


@pytest.mark.parametrize("name", ["softmax", "long-short-attention"])
def test_long_short_attention_logger_sees_logits_grow_at_a_high_learning_rate(name: str) -> None:
    """Of either kind of layer. Which grow faster is noise at this size, and is not claimed here."""
    probe = sentences(8, 48, torch.Generator().manual_seed(5))
    largest: list[float] = []

    @torch.no_grad()
    def watch(model: Language, step: int) -> None:
        if step in (0, 59):
            attention, norm = model.blocks[0].attention, model.blocks[0].norms[0]
            largest.append(float(largest_logits(attention, norm(model.embed(probe))).max()))

    options = {} if name == "softmax" else {"window": 8}
    train(name, position="rope", batch=8, steps=60, rate=3e-2, each=watch, **options)
    assert largest[1] > largest[0] > 0


@pytest.mark.parametrize("option", [{"window": 0}, {"long_heads": 5}, {"long_heads": -1}])
def test_long_short_attention_refuses(option) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        _layer(**option)
