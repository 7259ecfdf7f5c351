"""combiner: every token is met, far ones through summaries of their regions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import attlas
from attlas.layers.sparse.combiner import Combiner

NAME = "combiner"
FORMS = [
    {"regions": "fixed", "causal": True},
    {"regions": "fixed", "causal": False},
    {"regions": "log", "causal": True},
    {"regions": "log", "causal": False},
    {"regions": "axial", "causal": True},
    {"regions": "axial", "causal": False},
]


def _layer(**options: object) -> Combiner:
    return attlas.make(NAME, **{"dim": 16, "heads": 2, "segment": 4, **options}).double().eval()


def _x(tokens: int = 23, batch: int = 2) -> Tensor:
    return torch.randn(batch, tokens, 16, dtype=torch.float64)


def _met(layer: Combiner, i: int, n: int) -> tuple[list[int], list[list[int]]]:
    """Direct tokens of query i, and its regions, from the definition of each pattern."""
    size, every = layer.segment, range(n)
    row, last = i // size, i if layer.causal else n - 1
    direct = [j for j in every if j // size == row and j <= last]
    if layer.regions == "fixed":
        rows = range(row) if layer.causal else [r for r in range(-(-n // size)) if r != row]
        return direct, [[j for j in every if j // size == r] for r in rows]
    if layer.regions == "log":
        regions, level = [], 0
        while (1 << level) < -(-n // size):
            node = row >> level
            inside = [j for j in every if (j // size) >> level == node ^ 1]
            if inside and (node % 2 == 1 or not layer.causal):
                regions.append(inside)
            level += 1
        return direct, regions
    column, causal = i % size, layer.causal
    rows = range(-(-n // size))
    others = [r for r in rows if (r < row if causal else r != row)]
    direct += [r * size + column for r in others if r * size + column < n]
    lines = [
        [r * size + c for r in side] for c in range(size) if c != column or not causal
        for side in (range(row), [] if causal else rows[row + 1 :])
    ] + [
        [r * size + c for c in side] for r in (others if causal else rows)
        for side in (range(column), range(column + 1, size))
    ]  # fmt: skip
    lines = [[j for j in line if j < n] for line in lines]
    return direct, [line for line in lines if line]


def _pooled(layer: Combiner, x: Tensor) -> Tensor:
    x = x.relu() if layer.activation == "relu" else x
    return {"max": x.amax(0), "mean": x.mean(0), "sum": x.sum(0)}[layer.pooling]


def _defined(layer: Combiner, q: Tensor, k: Tensor) -> Tensor:
    """Implied weights of one head, query by query."""
    n, q = len(q), q * layer.scale
    weights = torch.zeros(n, n, dtype=q.dtype)
    for i in range(n):
        direct, regions = _met(layer, i, n)
        scores = [q[i] @ k[j] for j in direct]
        scores += [q[i] @ _pooled(layer, k[inside]) for inside in regions]
        shares = torch.stack(scores).softmax(-1)
        weights[i, direct] = shares[: len(direct)]
        for share, inside in zip(shares[len(direct) :], regions, strict=True):
            weights[i, inside] += share * (k[inside] @ _pooled(layer, q[inside])).softmax(-1)
    return weights


def _check(layer: Combiner, x: Tensor) -> None:
    q, k, v, inputs = layer.prepare(x)
    wanted = torch.stack([
        torch.stack([_defined(layer, q[b, h], k[b, h]) for h in range(q.shape[1])])
        for b in range(len(x))
    ])  # fmt: skip
    torch.testing.assert_close(layer.weights(x), wanted)
    torch.testing.assert_close(layer.attend(q, k, v, inputs), wanted @ v)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 23])
def test_the_factored_sum_is_that_of_the_dense_matrix(form: dict[str, object], tokens: int) -> None:
    _check(_layer(**form), _x(tokens, 1))


@pytest.mark.parametrize("pooling", ["max", "mean", "sum"])
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("regions", ["fixed", "log"])
def test_every_pooling_is_that_of_the_dense_matrix(pooling: str, activation: str, regions: str) -> None:
    for causal in (True, False):
        options = {"pooling": pooling, "activation": activation, "regions": regions}
        _check(_layer(causal=causal, position="rope", **options), _x(14, 1))


@pytest.mark.parametrize("form", [*FORMS, {"causal": False, "own_region": True}], ids=str)
def test_weights_are_positive_on_every_visible_token_and_sum_to_one(form: dict[str, object]) -> None:
    layer, x = _layer(**form), _x()
    valid = torch.ones(2, 23, dtype=torch.bool)
    valid[0, :5], valid[1, [2, 9, 22]] = False, False
    for mask in (None, valid):
        weights = layer.weights(x, mask=mask)
        seen = torch.ones(2, 1, 23, 23, dtype=torch.bool)
        seen = seen.tril() if layer.causal else seen
        rows = torch.ones(2, 23, dtype=torch.bool) if mask is None else mask
        seen = (seen & rows[:, None, None, :]).expand_as(weights).transpose(1, 2)[rows]
        weights = weights.transpose(1, 2)[rows]
        assert bool((weights[seen] > 0).all())
        assert bool((weights[~seen] == 0).all())
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_regions_of_one_token_give_exact_attention(causal: bool) -> None:
    plain = attlas.Attention(16, 2, causal=causal).double()
    x = _x()
    for options in ({"segment": 1}, {"segment": 23}, {"segment": 64, "regions": "log"}):
        layer = _layer(causal=causal, **options)
        plain.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(x), plain(x))
    if causal:  # one column, or one row
        for segment in (1, 23):
            layer = _layer(segment=segment, regions="axial", causal=True)
            plain.load_state_dict(layer.state_dict())
            torch.testing.assert_close(layer(x), plain(x))


def _products(tokens: int, **options: object) -> int:
    layer = attlas.make(NAME, dim=16, heads=1, causal=True, **options)
    q, k, v, inputs = layer.prepare(torch.zeros(1, tokens, 16))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer.attend(q, k, v, inputs)
    return counter.get_total_flops()


def test_cost_follows_n_root_n_or_n_log_n() -> None:
    """Four times the length: 8 times the products, or 4 times and one for each level more."""
    for regions in ("fixed", "axial"):
        few, many = (_products(4**p, segment=2**p, regions=regions) for p in (4, 5))
        assert 7 <= many / few <= 8.1
    few, many = (_products(n, segment=1, regions="log") for n in (256, 1024))
    assert 4 < many / few <= 4 * 10.5 / 8


@pytest.mark.parametrize("regions", ["fixed", "log", "axial"])
@pytest.mark.parametrize("position", [None, "rope"])
def test_prefill_and_steps_are_one_pass_with_padding_too(regions: str, position: str | None) -> None:
    layer, x = _layer(regions=regions, causal=True, position=position, kv_heads=1), _x()
    valid = torch.ones(2, 23, dtype=torch.bool)
    valid[0, [0, 1, 7]], valid[1, 21] = False, False
    for mask in (None, valid):
        cache, seen, parts = layer.init_cache(), 0, []
        for part in x.split([9, 1, 1, 5, 1, 6], dim=1):
            seen += part.shape[1]
            parts.append(layer(part, mask=None if mask is None else mask[:, :seen], cache=cache))
        rows = torch.ones(2, 23, dtype=torch.bool) if mask is None else mask
        whole = layer(x, mask=mask)
        torch.testing.assert_close(torch.cat(parts, dim=1)[rows], whole[rows])
        for row in range(2):
            alone = layer(x[row : row + 1, rows[row]])[0]
            torch.testing.assert_close(whole[row, rows[row]], alone)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients_are_those_of_finite_differences(form: dict[str, object]) -> None:
    layer, x = _layer(dim=4, heads=1, segment=2, **form), torch.randn(1, 7, 4, dtype=torch.float64)
    torch.autograd.gradcheck(layer, x.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize(
    "options",
    [{"segment": 0}, {"regions": "other"}, {"activation": "relu", "regions": "axial"},
     {"pooling": "max", "regions": "axial", "causal": True}, {"position": "alibi"},
     {"own_region": True, "causal": True}],
)  # fmt: skip
def test_bad_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        attlas.make(NAME, **{"dim": 8, "heads": 2, **options})
