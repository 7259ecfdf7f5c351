"""contextual-position-encoding: with gates of 1 it counts tokens, like learned relative positions."""

from __future__ import annotations

import pytest
import torch

import attlas


def _layer(**options):
    layer = attlas.make("cope", **{"dim": 32, "heads": 4, "causal": True, **options}).double()
    torch.nn.init.normal_(layer.embedding)
    return layer


def test_contextual_position_encoding_of_open_gates_is_learned_relative_positions() -> None:
    layer = _layer(npos=20, gate_keys=True, bias=True)
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    q, k, _, inputs = layer.prepare(x)
    # Gate keys along each query, so long that every gate is 1: that of query i only reads key by
    # key, so keys are made for one query at a time.
    for i in range(11):
        inputs.carry("gates", 1e4 * q[:, :, i : i + 1].expand_as(k))
        weights = layer.weigh(q, k, inputs)[:, :, i]
        distance = (i - torch.arange(11)).clamp(min=-1) + 1  # the query's own token counts too
        bias = (q[:, :, i] @ layer.embedding.T)[..., distance]
        scores = ((q[:, :, i : i + 1] @ k.mT)[:, :, 0] + bias) * layer.scale
        wanted = scores[..., : i + 1].softmax(-1)
        torch.testing.assert_close(weights[..., : i + 1], wanted, atol=1e-5, rtol=0)
        assert (weights[..., i + 1 :] == 0).all()


def test_contextual_position_encoding_starts_without_positions() -> None:
    layer = attlas.make("cope", dim=32, heads=4, causal=True).double()
    plain = attlas.Attention(32, 4, causal=True).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(2, 11, 32, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain(x))


def test_contextual_position_encoding_counts_at_most_npos() -> None:
    layer = _layer(npos=3)
    count = layer.count(torch.ones(1, 1, 1, 9, dtype=torch.float64))
    assert count.flatten().tolist() == [2.0] * 8 + [1.0]


@pytest.mark.parametrize("options", [{"gate_keys": True}, {"value_gates": True}])
def test_contextual_position_encoding_decodes_with_every_gate(options: dict[str, bool]) -> None:
    layer = _layer(**options)
    x = torch.randn(2, 9, 32, dtype=torch.float64)
    cache = layer.init_cache()
    steps = [layer(x[:, t : t + 1], cache=cache) for t in range(9)]
    torch.testing.assert_close(torch.cat(steps, 1), layer(x))


def test_contextual_position_encoding_refuses_what_excludes_itself() -> None:
    with pytest.raises(ValueError, match="exclude each other"):
        _layer(gate_keys=True, value_gates=True)
    with pytest.raises(ValueError, match="npos must be at least 1"):
        attlas.make("cope", dim=8, heads=1, npos=0)
    with pytest.raises(ValueError, match="cannot be given together with CoPE"):
        _layer(position="alibi")(torch.randn(1, 3, 32, dtype=torch.float64))
