"""Plain attention: against PyTorch's own layer, and what the stages promise."""

from __future__ import annotations

import pytest
import torch

from attlas import Attention, masks


@pytest.mark.parametrize("causal", [False, True])
def test_equals_torch_multi_head_attention(causal: bool) -> None:
    layer = Attention(32, 4, causal=causal, bias=True).double()
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True).double()
    state = layer.state_dict()
    theirs.load_state_dict({
        "in_proj_weight": torch.cat([state[f"{n}_proj.weight"] for n in "qkv"]),
        "in_proj_bias": torch.cat([state[f"{n}_proj.bias"] for n in "qkv"]),
        "out_proj.weight": state["o_proj.weight"], "out_proj.bias": state["o_proj.bias"],
    })  # fmt: skip
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    hidden = torch.ones(11, 11, dtype=torch.bool).triu(1) if causal else None
    wanted, weights = theirs(x, x, x, attn_mask=hidden, average_attn_weights=False)
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer.weights(x), weights)


def test_a_pattern_with_sinks_decodes_as_it_trains() -> None:
    pattern = masks.window(4) | masks.sinks(2)
    layer = Attention(32, 4, causal=True, mask=pattern, position="rope").double()
    x = torch.randn(2, 15, 32, dtype=torch.float64)
    cache = layer.init_cache()
    parts = [layer(part, cache=cache) for part in x.split([6, 1, 1, 3, 1, 3], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), layer(x))


def test_absolute_patterns_count_real_tokens_when_padded() -> None:
    layer = Attention(32, 4, causal=True, mask=masks.window(3) | masks.sinks(2)).double()
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    padded = torch.cat((torch.randn(1, 4, 32, dtype=torch.float64), x), 1)
    valid = torch.arange(13)[None] >= 4
    torch.testing.assert_close(layer(padded, mask=valid)[:, 4:], layer(x))


def test_dropout_acts_while_training_alone() -> None:
    layer = Attention(32, 4, dropout=0.5)
    x = torch.randn(2, 11, 32)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"dim": 30}, "heads must divide dim=30"),
        ({"dim": 32, "kv_heads": 3}, "kv_heads must divide heads=4"),
        ({"dim": 0}, "dim must be"),
        ({"dim": 32, "dropout": 1.0}, "dropout must be"),
        ({"dim": 32, "position": "rop"}, "did you mean 'rope'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(options: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Attention(heads=4, **options)
