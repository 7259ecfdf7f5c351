"""Layers with their own weights attend in blocks of queries where all pairs would fill the memory."""

from __future__ import annotations

import pytest
import torch

import attlas
from attlas import masks, queries


def few_pairs(monkeypatch: pytest.MonkeyPatch, block: int, kept: int = 0) -> list[int]:
    """The queries of each block, as they come, of blocks of so many pairs."""
    monkeypatch.setattr(queries, "CPU_BLOCK", block)
    monkeypatch.setattr(queries, "KEPT", kept)
    seen: list[int] = []
    block_of = queries._block

    def spied(layer, q, k, v, inputs, at):
        seen.append(at.stop - at.start)
        return block_of(layer, q, k, v, inputs, at)

    monkeypatch.setattr(queries, "_block", spied)
    return seen


def test_queries_come_in_blocks_of_so_many_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = few_pairs(monkeypatch, block=2 * 4 * 20 * 6)
    layer = attlas.make("contextual-position-encoding", dim=16, heads=4, causal=True)
    layer(torch.randn(2, 20, 16))
    assert seen == [6, 6, 6, 2]


def test_what_is_differentiated_is_held_whole_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = attlas.make("contextual-position-encoding", dim=16, heads=4, causal=True)
    seen = few_pairs(monkeypatch, block=8, kept=2 * 4 * 20 * 20)
    layer(torch.randn(2, 20, 16)).sum().backward()
    assert not seen
    layer(torch.randn(2, 21, 16)).sum().backward()
    assert seen == [1] * 21


@pytest.mark.parametrize("position", ["alibi", "t5", "rope"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("told", ["told", "window", "plain"])
def test_blocks_know_where_they_stand(
    monkeypatch: pytest.MonkeyPatch, position: str, causal: bool, told: str
) -> None:
    torch.manual_seed(0)
    layer = attlas.make(
        "neural-attention", dim=32, heads=4, kv_heads=2, causal=causal, position=position,
        mask=masks.window(5) if told == "window" else None, projection_dim=4,
    ).double()  # fmt: skip
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    options = {}
    if told == "told":
        options = {"positions": torch.stack([torch.arange(20) + 7, torch.arange(20) * 3])}
    whole = layer(x, **options)
    seen = few_pairs(monkeypatch, block=2 * 4 * 20 * 6)
    torch.testing.assert_close(layer(x, **options), whole, atol=1e-12, rtol=0)
    assert len(seen) == 4


def test_a_second_sequence_is_attended_to_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = attlas.make("neural-attention", dim=32, heads=4, projection_dim=4).double()
    x, context = (torch.randn(2, n, 32, dtype=torch.float64) for n in (20, 7))
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[0, 5:] = False
    whole = layer(x, context, mask=valid)
    seen = few_pairs(monkeypatch, block=2 * 4 * 7 * 6)
    torch.testing.assert_close(layer(x, context, mask=valid), whole, atol=1e-12, rtol=0)
    assert len(seen) == 4


def test_a_question_behind_a_cache_is_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = attlas.make(
        "contextual-position-encoding", dim=32, heads=4, causal=True, gate_keys=True
    ).double()
    torch.nn.init.normal_(layer.embedding)
    x = torch.randn(2, 30, 32, dtype=torch.float64)
    whole = layer(x)
    cache = layer.init_cache()
    layer(x[:, :10], cache=cache)
    seen = few_pairs(monkeypatch, block=2 * 4 * 30 * 6)
    torch.testing.assert_close(layer(x[:, 10:], cache=cache), whole[:, 10:], atol=1e-12, rtol=0)
    assert len(seen) == 4


@pytest.mark.parametrize("name", ["multi-token-attention", "sinkformer"])
def test_rows_that_rest_on_each_other_are_held_together(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    layer = attlas.make(name, dim=16, heads=4)
    seen = few_pairs(monkeypatch, block=8)
    layer(torch.randn(1, 12, 16))
    assert not seen
