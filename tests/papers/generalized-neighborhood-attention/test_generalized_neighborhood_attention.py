"""What the catalogue asks of generalized neighbourhood attention, clause by clause."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import attlas
from attlas import masks, ops
from attlas.masks.neighborhood import Neighborhood, Order, axes_of
from attlas.masks.tiles import best_tiles, visits
from attlas.ops.blocks import plan
from attlas.ops.generalized_neighborhood import generalized_neighborhood

EXACT: dict[str, Any] = {"atol": 1e-12, "rtol": 0}


def shown(length: int, k: int, s: int, d: int, causal: bool) -> Tensor:
    """[length, length] pairs along one axis, by a leader and a centre that is clamped."""
    pairs = torch.zeros(length, length, dtype=torch.bool)
    for q, key in product(range(length), repeat=2):
        if q % d != key % d:
            continue
        n, x, y = len(range(q % d, length, d)), q // d, key // d
        if causal:
            leader = min(x // s * s + s - 1, n - 1)
            pairs[q, key] = y <= x and leader - y < k
            continue
        left, right = k // 2, k // 2 + k % 2 - 1
        leader = min(x // s * s + s // 2, n - 1)
        centre = min(max(leader, left), n - 1 - right)
        pairs[q, key] = centre - left <= y <= centre + right
    return pairs


def crossed(shape: tuple[int, ...], *rest: tuple[Any, ...]) -> Tensor:
    """[tokens, tokens] pairs of a grid: those that every axis shows."""
    pairs = torch.ones(1, 1, dtype=torch.bool)
    for each in zip(shape, *rest, strict=True):
        own = shown(*each)
        pairs = (pairs[:, None, :, None] & own[None, :, None, :]).flatten(2).flatten(0, 1)
    return pairs


def drawn(rng: random.Random) -> tuple[tuple[Any, ...], ...]:
    """A small grid of 1 to 3 axes: (shape, window, stride, dilation, causal)."""
    axes = rng.choice((1, 2, 3))
    shape = tuple(rng.randint(2, (40, 9, 5)[axes - 1]) for _ in range(axes))
    dilation = tuple(rng.randint(1, n // 2) for n in shape)
    window = tuple(rng.randint(1, n // d) for n, d in zip(shape, dilation, strict=True))
    stride = tuple(rng.randint(1, w) for w in window)
    return shape, window, stride, dilation, tuple(rng.random() < 0.4 for _ in shape)


def qkv(tokens: int, heads: int = 2, kv: int = 2, **kind: Any) -> list[Tensor]:
    kind = {"dtype": torch.float64, **kind}
    return [torch.randn(2, h, tokens, w, **kind) for h, w in ((heads, 8), (kv, 8), (kv, 6))]


def test_masks_agree_with_the_definition_for_all_settings_of_an_axis() -> None:
    for n, d in ((9, 1), (8, 2), (11, 3)):
        for w in range(1, n // d + 1):
            for s, causal in product(range(1, w + 1), (False, True)):
                mask = masks.neighborhood(n, w, stride=s, dilation=d, causal=causal)
                assert torch.equal(masks.dense(mask, n, n)[0, 0], shown(n, w, s, d, causal))


def test_masks_and_tiles_agree_with_the_definition_on_small_grids() -> None:
    """Of tokens in tiles, in any dimension: the same pairs, none of what fills up, and blocks of a tile
    each that are visited if and only if a pair in them is visible."""
    rng = random.Random(0)
    for _ in range(60):
        shape, *rest = drawn(rng)
        wanted = crossed(shape, *rest)
        natural = masks.neighborhood(shape, rest[0], **_named(rest[1:]))
        assert torch.equal(masks.dense(natural, len(wanted), len(wanted))[0, 0], wanted)
        tiles = [tuple(rng.choice((1, 2, 3, 4)) for _ in shape) for _ in range(2)]
        queries, keys = (Order(shape, rest[2], tile) for tile in tiles)
        mask = Neighborhood(natural.axes, queries, keys)
        pairs = masks.dense(mask, queries.tokens, keys.tokens, q_offset=0)[0, 0]
        q_at, k_at = (order.row_major() for order in (queries, keys))
        assert sorted(q_at[q_at >= 0].tolist()) == list(range(len(wanted)))
        inside = pairs[q_at >= 0][:, k_at >= 0]
        assert torch.equal(inside, wanted[q_at[q_at >= 0]][:, k_at[k_at >= 0]])
        assert not pairs[:, k_at < 0].any()
        size = [math.prod(tile) for tile in tiles]
        for block in (size, (3, 5)):
            some, every = masks.grid(
                mask, *pairs.shape, q_block=block[0], k_block=block[1], q_offset=0
            )
            blocks = [list(rows.split(block[1], dim=1)) for rows in pairs.split(block[0])]
            any_pair = torch.tensor([[b.any() for b in row] for row in blocks])
            all_pairs = torch.tensor([[b.all() for b in row] for row in blocks])
            assert not (any_pair & ~some[0, 0]).any()
            assert not (every[0, 0] & ~all_pairs).any()
            if block is size:
                assert torch.equal(some[0, 0], any_pair)


def _named(rest: list[Any]) -> dict[str, Any]:
    return dict(zip(("stride", "dilation", "causal"), rest, strict=True))


def test_routes_agree_with_the_masked_definition() -> None:
    """Output, lse and gradients, of grouped heads and values of another width."""
    rng = random.Random(1)
    for _ in range(12):
        shape, window, *rest = drawn(rng)
        grid = {"shape": shape, "window": window, **_named(rest)}
        found = {}
        inputs = qkv(math.prod(shape), heads=4)
        for route in ("dense", "gather", "tiles", "auto"):
            given = [t.clone().requires_grad_() for t in inputs]
            out, lse = generalized_neighborhood(*given, **grid, return_lse=True, route=route)
            (out.square().sum() + lse.exp().sum()).backward()
            alone = generalized_neighborhood(*given, **grid, route=route)
            torch.testing.assert_close(alone, out, **EXACT)
            found[route] = [out, lse, *(t.grad for t in given)]
        wanted = ops.reference(*inputs, scale=8**-0.5, mask=crossed(shape, window, *rest)[None, None])
        torch.testing.assert_close(found["dense"][0].detach(), wanted[0], **EXACT)
        for route in ("gather", "tiles", "auto"):
            for ours, theirs in zip(found[route], found["dense"], strict=True):
                torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_err_at_most_twice_as_much_as_the_plain_computation(dtype: torch.dtype) -> None:
    q, k, v = qkv(1024, dtype=dtype)
    grid = {"shape": (32, 32), "window": (9, 8), "stride": (2, 4)}
    truth = generalized_neighborhood(q.double(), k.double(), v.double(), **grid, route="dense")
    plain = generalized_neighborhood(q, k, v, **grid, route="dense")
    fast = generalized_neighborhood(q, k, v, **grid)
    assert fast.dtype == dtype
    ulp = torch.finfo(dtype).eps * truth.abs().max()
    assert (fast - truth).abs().max() <= 2 * (plain - truth).abs().max() + ulp


@pytest.mark.parametrize("route", ["auto", "dense", "tiles"])
def test_a_stride_equal_to_the_window_is_blocked_attention(route: str) -> None:
    q, k, v = qkv(8 * 12)
    out = generalized_neighborhood(q, k, v, shape=(8, 12), window=(4, 3), stride=(4, 3), route=route)

    def windows(x: Tensor) -> Tensor:
        return x.view(2, 2, 2, 4, 4, 3, -1).permute(0, 2, 4, 1, 3, 5, 6).reshape(16, 2, 12, -1)

    blocked, _ = ops.reference(*map(windows, (q, k, v)), scale=8**-0.5)
    torch.testing.assert_close(windows(out), blocked, **EXACT)


@pytest.mark.parametrize("route", ["auto", "dense", "tiles"])
@pytest.mark.parametrize("stride", [1, (2, 3)])
def test_a_window_that_covers_the_grid_is_full_attention(route: str, stride: Any) -> None:
    q, k, v = qkv(6 * 7)
    out = generalized_neighborhood(q, k, v, shape=(6, 7), window=(6, 7), stride=stride, route=route)
    torch.testing.assert_close(out, ops.reference(q, k, v, scale=8**-0.5)[0], **EXACT)


@pytest.mark.parametrize(
    ("shape", "window", "stride", "dilation"),
    [((4096,), (512,), (128,), (1,)), ((64, 64), (24, 48), (8, 16), (1, 1)),
     ((64, 64), (13, 13), (1, 1), (1, 1)), ((48, 48), (7, 9), (2, 1), (2, 3)),
     ((16, 16, 16), (5, 5, 8), (1, 1, 4), (1, 1, 1))],
)  # fmt: skip
def test_the_engine_visits_the_tiles_that_the_simulator_counts(
    shape: Any, window: Any, stride: Any, dilation: Any
) -> None:
    axes = axes_of(shape, window, stride, dilation)
    tiles = best_tiles(axes, 128, 64)
    queries, keys = (Order(shape, dilation, tile) for tile in tiles)
    mask = Neighborhood(axes, queries, keys)
    chunks = plan(mask, queries.tokens, keys.tokens, 0, torch.device("cpu"))
    visited = sum(len(torch.arange(keys.tokens)[chunk.keys]) for chunk in chunks) // 64
    told = visits(axes, *tiles)
    # Tiles that only fill up shorter dilation groups are visited, and are no work that was asked for.
    exact = all(n % (d * t) == 0 for n, d, t in zip(shape, dilation, tiles[0], strict=True))
    assert visited == told.visited if exact else told.visited <= visited < 1.3 * told.visited
    if told.whole:
        assert all(chunk.visible is None for chunk in chunks)


def test_the_simulator_knows_what_is_perfectly_block_sparse() -> None:
    aligned = visits(axes_of((64, 64), (24, 48), (8, 16)), (8, 16), (8, 8))
    assert aligned.whole
    assert aligned.speedup == aligned.ideal == pytest.approx(64 * 64 / (24 * 48))
    sliding = visits(axes_of((64, 64), (24, 48)), (8, 16), (8, 8))
    assert not sliding.whole
    assert 1 < sliding.speedup < sliding.ideal == aligned.ideal
    dense = visits(axes_of((64, 64), 64), (8, 16), (8, 8))
    assert dense.speedup == dense.ideal == 1


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"window": 9}, "window=.* must fit shape"),
        ({"window": (3, 3), "dilation": (1, 3)}, "dilation=.* must fit shape"),
        ({"window": 3, "stride": (1, 4)}, "stride=.* must be at most window"),
        ({"window": (3, 3, 3)}, "window takes one value, or 2"),
        ({"window": 0}, "window takes a whole number"),
        ({"window": 3, "causal": (1, 0)}, "causal takes True or False"),
        ({"window": 3, "shape": (2, 2, 4, 4)}, "shape takes the lengths of 1 to 3 axes"),
        ({"window": 3, "shape": (8, 9)}, "q must be .* 72"),
        ({"window": 3, "route": "fast"}, "route"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(grid: dict[str, Any], said: str) -> None:
    q, k, v = qkv(64)
    with pytest.raises(ValueError, match=said):
        generalized_neighborhood(q, k, v, **{"shape": (8, 8), **grid})


COMPILED = """
import torch, attlas
made = attlas.make("gna", shape=(20, 20), window=(5, 3), stride=2, causal=(True, False))
q, k, v = (torch.randn(2, 2, 400, 8) for _ in range(3))
compiled = torch.compile(made, backend="eager", fullgraph=True)
torch.testing.assert_close(compiled(q, k, v), made(q, k, v))
"""


def test_it_is_compiled_whole() -> None:
    """In a process of its own: shapes are checked by a hook here, which stops a compiler."""
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


def test_on_the_meta_device_it_tells_shapes() -> None:
    made = attlas.make("gna", shape=(20, 20), window=3, stride=2)
    out = made(*(t.to("meta") for t in qkv(400)))
    assert out.shape == (2, 2, 400, 6)
