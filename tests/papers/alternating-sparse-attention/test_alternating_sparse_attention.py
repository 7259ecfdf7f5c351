"""alternating-sparse-attention: by turns a window, or compressed and chosen blocks, over latents; and
native sparse attention, which has all three branches in each layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attlas
from attlas import masks
from attlas.hf.caches import Cache
from attlas.layers.sparse.alternating_sparse import AlternatingSparse
from attlas.layers.sparse.native_sparse import NativeSparse

NATIVE, ALTERNATING = "native-sparse-attention", "alternating-sparse-attention"


def native(**options: object) -> NativeSparse:
    torch.manual_seed(0)
    sizes = {"dim": 32, "heads": 4, "kv_heads": 2, "block": 8, "stride": 4, "selected": 8}
    few = {"topk": 3, "recent": 1, "window": 5, "hidden": 16}
    made = attlas.make(NATIVE, **{**sizes, **few, **options}).double().eval()
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def alternating(layer_idx: int = 1, **options: object) -> AlternatingSparse:
    torch.manual_seed(0)
    sizes = {"dim": 64, "heads": 8, "kv_heads": 2, "block": 4, "stride": 4, "selected": 4}
    few = {"topk": 4, "window": 6, "hidden": 16}
    made = attlas.make(ALTERNATING, **{**sizes, **few, **options}, layer_idx=layer_idx)
    return made.double().eval()


def inputs(tokens: int, dim: int = 32, batch: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, tokens, dim, dtype=torch.float64)


def by_hand(layer: NativeSparse, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    """The three branches by loops, each query for itself: [batch, heads, tokens, width]."""
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    size, stride, wide, group = layer.block, layer.stride, layer.selected, layer.heads // layer.kv_heads
    compressed = [
        (layer.k_compress(k[:, :, at : at + size]), layer.v_compress(v[:, :, at : at + size]))
        for at in range(0, q.shape[2] - size + 1, stride)
    ]

    def attended(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        weights = (keys @ query * layer.scale).softmax(0)
        return weights @ values, weights

    for b in range(len(q)):
        for g in range(layer.kv_heads):
            heads = range(g * group, (g + 1) * group)
            for t in range(q.shape[2]):
                whole = [(x[b, g, 0], y[b, g, 0]) for i, (x, y) in enumerate(compressed)
                         if i * stride + size <= t + 1]  # fmt: skip
                worth = dict.fromkeys(range(t // wide + 1), 0.0)
                for h in heads if whole else ():
                    keys, values = (torch.stack(side) for side in zip(*whole, strict=True))
                    summed, weights = attended(q[b, h, t], keys, values)
                    out[b, h, t] += gates[b, h, t, 0] * summed
                    for i, weight in enumerate(weights.tolist()):
                        for token in range(i * stride, i * stride + size, stride):
                            if token // wide in worth:
                                worth[token // wide] += weight
                worth = {j: w for j, w in worth.items()
                         if layer.first <= j <= t // wide - layer.recent}  # fmt: skip
                always = {j for j in range(t // wide + 1) if j not in worth}
                best = sorted(worth, key=lambda j: -worth[j])[: max(0, layer.topk - len(always))]
                read = [j for j in range(t + 1) if j // wide in always | set(best)]
                near = list(range(max(0, t + 1 - (layer.window or 0)), t + 1))
                for branch, tokens in enumerate((read, near)[: gates.shape[-1] - 1], start=1):
                    for h in heads:
                        summed, _ = attended(q[b, h, t], k[b, g, tokens], v[b, g, tokens])
                        out[b, h, t] += gates[b, h, t, branch] * summed
    return out


# Native sparse attention -------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["mlp", "mean"])
@pytest.mark.parametrize("options", [
    {}, {"block": 4}, {"selected": 4, "topk": 5, "recent": 2}, {"window": None},
    {"block": 12, "selected": 4, "first": 0},
])  # fmt: skip
def test_alternating_sparse_attention_native_branches_are_those_of_their_definition(
    compression: str, options: dict[str, object]
) -> None:
    layer = native(compression=compression, position="rope", **options)
    q, k, v, given = layer.prepare(inputs(37))
    torch.testing.assert_close(
        layer.attend(q, k, v, given), by_hand(layer, q, k, v, given.notes["gates"])
    )


def test_alternating_sparse_attention_native_blocks_covering_everything_give_full_attention() -> None:
    layer = native(topk=7, position="rope")
    with torch.no_grad():
        layer.gate_proj.weight.zero_()
        layer.gate_proj.bias.copy_(torch.tensor([-torch.inf, torch.inf, -torch.inf]).repeat(4))
    plain = attlas.Attention(32, 4, kv_heads=2, causal=True, position="rope").double()
    plain.load_state_dict({name: layer.state_dict()[name] for name in plain.state_dict()})
    x = inputs(50)
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-10)


def test_alternating_sparse_attention_native_a_group_reads_the_same_blocks() -> None:
    layer = native(heads=8, kv_heads=2)
    q, k, v, given = layer.prepare(inputs(60))
    tokens = layer.blocks(q, k, given, 1)
    _, chosen = layer.coarse(q, *layer.summaries(k, v, given), tokens)
    assert chosen.shape == (2, 2, 60, 3)
    assert not torch.equal(chosen[:, 0], chosen[:, 1])
    seen = layer.chosen_pairs(q, k, chosen, given)
    assert torch.equal(seen[:, 0], seen[:, 3])


def future_leaks(layer: NativeSparse, tokens: int = 60, now: int = 31) -> bool:
    x = inputs(tokens, layer.dim)
    other = x.clone()
    other[:, now:] = torch.randn_like(x[:, now:])
    return not torch.equal(layer(x)[:, :now], layer(other)[:, :now])


def test_alternating_sparse_attention_is_causal() -> None:
    assert not future_leaks(native(position="rope"))
    assert not future_leaks(alternating(0))
    assert not future_leaks(alternating(1))


def test_alternating_sparse_attention_native_goes_in_stretches_as_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer, x = native(), inputs(90).requires_grad_()
    found = []
    for rows in (256, 16):
        monkeypatch.setattr("attlas.layers.sparse.native_sparse.ROWS", rows)
        y = layer(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["native", "global", "local"])
def test_alternating_sparse_attention_steps_read_what_they_chose(name: str) -> None:
    """Over many blocks, rows padded differently, in pieces and token by token."""
    layer = {"native": native(position="rope"), "global": alternating(1), "local": alternating(0)}[name]
    x = inputs(70, layer.dim)
    valid = torch.ones(2, 70, dtype=torch.bool)
    valid[1, :13] = False
    for mask in (None, valid):
        whole, cache, seen, parts = layer(x, mask=mask), attlas_cache(layer), 0, []
        for part in x.split([33, 9, *[1] * 28], dim=1):
            seen += part.shape[1]
            parts.append(layer(part, mask=None if mask is None else mask[:, :seen], cache=cache))
        stepped = torch.cat(parts, dim=1)
        torch.testing.assert_close(stepped[valid], whole[valid])


def attlas_cache(layer: NativeSparse) -> Cache:
    return layer.init_cache()


def test_alternating_sparse_attention_a_step_compresses_no_block_twice() -> None:
    layer, x, lengths = native(), inputs(70), []
    layer.k_compress.register_forward_hook(lambda _, given, __: lengths.append(given[0].shape[2]))
    cache = layer.init_cache()
    for part in x.split([60, *[1] * 10], dim=1):
        layer(part, cache=cache)
    assert lengths[0] == 60
    assert max(lengths[1:]) < layer.block + layer.stride


def test_alternating_sparse_attention_native_cuts_blocks_by_a_rows_own_tokens() -> None:
    layer, x = native(position="rope"), inputs(40)
    torch.manual_seed(2)
    valid = torch.rand(2, 40) > 0.3
    padded = layer(x, mask=valid)
    for row in range(2):
        alone = layer(x[row : row + 1, valid[row]])
        torch.testing.assert_close(padded[row, valid[row]], alone[0])


# The alternating form ----------------------------------------------------------------------------


def test_alternating_sparse_attention_layer_idx_decides_what_a_layer_looks_at() -> None:
    scopes = [alternating(at).scope for at in range(4)]
    assert scopes == ["local", "global", "local", "global"]
    assert not hasattr(alternating(0), "gate_proj")
    x = inputs(60, 64)
    far = x.clone()
    far[:, :20] = torch.randn_like(x[:, :20])
    local, wide = alternating(0), alternating(1)
    assert torch.equal(local(x)[:, 25:], local(far)[:, 25:])  # 5 earlier tokens are in the window
    assert (wide(x) - wide(far))[:, 40:].abs().amax(-1).min() > 0


def test_alternating_sparse_attention_local_layers_are_latent_attention_in_a_window() -> None:
    ours, x = alternating(0), inputs(50, 64)
    theirs = attlas.make(
        "multi-head-latent-attention", dim=64, heads=8, latent=ours.latent, rotary=ours.rotary,
        causal=True, mask=masks.window(6),
    ).double()  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("compression", ["mlp", "mean"])
def test_alternating_sparse_attention_global_layers_are_two_branches_over_made_keys(
    compression: str,
) -> None:
    layer = alternating(1, compression=compression)
    q, k, v, given = layer.prepare(inputs(37, 64))
    keys, values, gates = layer.keys_of(k), layer.values_of(v), given.notes["gates"]
    assert keys.shape == (2, 2, 37, layer.head_dim + layer.rotary)
    assert gates.shape == (2, 8, 37, 2)
    torch.testing.assert_close(
        layer.attend(q, k, v, given), by_hand(layer, q, keys, values, gates)
    )


def test_alternating_sparse_attention_global_blocks_covering_everything_give_full_attention() -> None:
    layer = alternating(1, topk=13)
    with torch.no_grad():
        layer.gate_proj.weight.zero_()
        layer.gate_proj.bias.copy_(torch.tensor([-torch.inf, torch.inf]).repeat(8))
    q, k, v, given = layer.prepare(inputs(50, 64))
    wanted = attlas.ops.attend(
        q, layer.keys_of(k), layer.values_of(v), mask=masks.causal, scale=layer.scale
    )
    torch.testing.assert_close(layer.attend(q, k, v, given), wanted)


def held(layer: NativeSparse, tokens: int) -> tuple[int, int]:
    """(bytes of keys and values, of what is remembered beside them) in a cache of so many tokens."""
    layer = layer.float()
    cache = layer.init_cache()
    layer(torch.randn(1, tokens, layer.dim), cache=cache)
    own = cache.layers[layer.layer_idx]
    states = getattr(own, "states", {})
    return own.keys.nbytes + own.values.nbytes, sum(state.nbytes for state in states.values())


@pytest.mark.parametrize(("heads", "kv_heads"), [(16, 4), (16, 1), (12, 3), (8, 8)])
def test_alternating_sparse_attention_caches_half_of_native_sparse_attention(
    heads: int, kv_heads: int
) -> None:
    """Bytes a token, at the papers' sizes of blocks: of keys and values half; with compressed blocks,
    which a global layer keeps too, 1 % more."""
    sizes = {"dim": heads * 32, "heads": heads, "kv_heads": kv_heads, "compression": "mean"}
    tokens = 640
    plain = held(attlas.make(NATIVE, **sizes), tokens)
    turns = [held(attlas.make(ALTERNATING, **sizes, layer_idx=at), tokens) for at in (0, 1)]
    assert plain[0] == tokens * 2 * kv_heads * 32 * 4
    for own, _ in turns:
        assert own * 2 == plain[0]
    assert turns[0][1] == 0
    assert sum(map(sum, turns)) / 2 <= 0.51 * sum(plain)


def test_alternating_sparse_attention_refuses_sizes_that_do_not_go_together() -> None:
    for options, name in (
        ({"stride": 3}, "stride"), ({"selected": 6}, "stride"), ({"topk": 1}, "topk"),
        ({"position": "alibi"}, "position"), ({"block": 0}, "block"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            native(**options)
    with pytest.raises(ValueError, match="window"):
        alternating(0, window=None)
    with pytest.raises(ValueError, match="position"):
        alternating(0, position="rope")
    with pytest.raises(ValueError, match="mask"):
        native()(inputs(8), mask=masks.window(3))
