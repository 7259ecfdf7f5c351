"""Titans with attention: a memory as a gate, as a layer and as context."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attlas

GATE, LAYER, CONTEXT = (f"titans-memory-as-{how}" for how in ("gate", "layer", "context"))


def _layer(name: str, **options: object) -> torch.nn.Module:
    options = {"dim": 8, "heads": 2, "persistent": 3, "memory": {"chunk": 2, "batch": 4}, **options}
    options = {**({"segment": 4} if name == CONTEXT else {"window": 5}), **options}
    layer = attlas.make(name, **options).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return layer


def _never_write(layer: torch.nn.Module) -> None:
    """No step, and a forgetting that no token changes."""
    with torch.no_grad():
        layer.memory.step_proj.weight.zero_()
        layer.memory.step_proj.bias.fill_(-1e4)
        layer.memory.decay_proj.weight.zero_()


def _x(tokens: int = 14, batch: int = 2) -> Tensor:
    return torch.randn(batch, tokens, 8, dtype=torch.float64)


def _attention(layer: torch.nn.Module, x: Tensor, prefix: list[Tensor], seen: Tensor) -> Tensor:
    """Softmax attention of x to what stands in front and to itself, `seen` telling what is visible."""
    tokens = torch.cat([t.expand(len(x), -1, -1) for t in (*prefix, x)], dim=1)
    heads = []
    for h in range(layer.heads):
        part = slice(h * layer.head_dim, (h + 1) * layer.head_dim)
        q = layer.q_proj(x)[..., part]
        k, v = layer.k_proj(tokens)[..., part], layer.v_proj(tokens)[..., part]
        scores = (q @ k.mT / layer.head_dim**0.5).masked_fill(~seen, -torch.inf)
        heads.append(scores.softmax(-1) @ v)
    return layer.o_proj(torch.cat(heads, dim=-1))


def _windowed(layer: torch.nn.Module, x: Tensor) -> Tensor:
    n = x.shape[1]
    near = torch.ones(n, n, dtype=torch.bool).tril().triu(1 - layer.window)
    seen = torch.cat((near.new_ones(n, layer.persistent), near), dim=1)
    return _attention(layer, x, [layer.tokens], seen)


def _gated(layer: torch.nn.Module, y: Tensor, m: Tensor) -> Tensor:
    def norm(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    return norm(y) * layer.own_norm.weight * (norm(m) * layer.memory_norm.weight).sigmoid()


def test_as_a_gate_what_is_near_is_multiplied_by_what_is_remembered() -> None:
    layer, x = _layer(GATE), _x()
    wanted = _gated(layer, _windowed(layer, x), layer.memory(x))
    torch.testing.assert_close(layer(x), wanted)


def test_as_a_layer_attention_sees_what_the_memory_makes_of_tokens() -> None:
    layer, x = _layer(LAYER), _x()
    torch.testing.assert_close(layer(x), _windowed(layer, layer.memory(x)))


@pytest.mark.parametrize(
    "memory", [{"chunk": 2, "batch": 4}, {"chunk": 4}, {"chunk": 1, "batch": 2}]
)
@pytest.mark.parametrize("tokens", [3, 8, 14])
def test_as_context_segments_attend_to_recollections(memory: dict[str, int], tokens: int) -> None:
    layer, x = _layer(CONTEXT, memory=memory), _x(tokens)
    cache, found = layer.memory.init_cache(), []
    rows = layer.memory.memory.row().expand(len(x), -1, -1)
    for segment in x.split(4, dim=1):
        q, *_, inputs = layer.memory.prepare(segment)
        recalled = layer.memory.memory(rows[:, :, None], q[:, :, None])[:, :, 0]
        recalled = layer.memory.output(recalled, inputs)
        earlier = torch.ones(segment.shape[1], segment.shape[1], dtype=torch.bool).tril()
        seen = torch.cat((earlier.new_ones(len(earlier), 3), earlier, earlier), dim=1)
        y = _attention(layer, segment, [layer.tokens, recalled], seen)
        found.append(_gated(layer, y, layer.memory(y, cache=cache)))
        rows = cache.layers[0].states["memory"]
    torch.testing.assert_close(layer(x), torch.cat(found, dim=1))


def test_segments_know_of_each_other_through_the_memory_alone() -> None:
    layer, x = _layer(CONTEXT), _x(12)
    changed = x.clone()
    changed[:, 1] += 1
    assert bool(((layer(changed) - layer(x))[:, 8:].abs() > 1e-9).any())
    _never_write(layer)
    torch.testing.assert_close(layer(changed)[:, 4:], layer(x)[:, 4:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [GATE, LAYER])
def test_what_has_left_the_window_is_known_through_the_memory_alone(name: str) -> None:
    layer, x = _layer(name, memory={"chunk": 2, "kernel": 1}), _x(14)
    changed = x.clone()
    changed[:, 1] += 1
    assert bool(((layer(changed) - layer(x))[:, 8:].abs() > 1e-9).any())
    _never_write(layer)
    torch.testing.assert_close(layer(changed)[:, 6:], layer(x)[:, 6:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [GATE, LAYER])
def test_weights_tell_of_persistent_tokens_too(name: str) -> None:
    weights = _layer(name).weights(_x(9))
    assert weights.shape[-1] == 3 + 9
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert bool((weights[..., :3] > 0).all())


@pytest.mark.parametrize("memory", [{"chunk": 2, "batch": 4}, {"chunk": 1}])
def test_padding_between_tokens_is_stepped_over_with_a_cache_too(memory: dict[str, int]) -> None:
    layer, x = _layer(CONTEXT, memory=memory), _x(24)
    valid = torch.ones(2, 24, dtype=torch.bool)
    valid[0, [3, 4, 9, 15, 22]] = False
    valid[1, [0, 1, 2, 3, 4, 5, 6, 13]] = False
    whole, cache, seen, parts = layer(x, mask=valid), layer.init_cache(), 0, []
    for part in x.split([7, 1, 6, 1, 1, 8], dim=1):
        seen += part.shape[1]
        parts.append(layer(part, mask=valid[:, :seen], cache=cache))
    for row in range(2):
        alone = layer(x[row : row + 1, valid[row]])[0]
        torch.testing.assert_close(whole[row, valid[row]], alone)
        torch.testing.assert_close(torch.cat(parts, dim=1)[row, valid[row]], alone)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [(GATE, {"window": 0}, "window"), (LAYER, {"persistent": 0}, "persistent"),
     (GATE, {"position": "alibi"}, "position"), (LAYER, {"memory": {"chunk": 0}}, "chunk"),
     (CONTEXT, {"segment": 0}, "segment"), (CONTEXT, {"segment": 6}, "segment"),
     (CONTEXT, {"memory": {"chunk": 2, "kernel": 4}}, "memory")],
)  # fmt: skip
def test_bad_options_are_named(name: str, options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        _layer(name, **options)


def test_a_map_of_weights_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="weights"):
        _layer(CONTEXT).weights(_x())
