"""local-linear-attention: a line through the values around every query."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attlas
from attlas import masks, ops
from attlas.layers.linear.local_linear import slope, sloped

NAME = "local-linear-attention"


def _prepared(layer: torch.nn.Module, tokens: int = 40) -> tuple:
    return layer.prepare(torch.randn(2, tokens, layer.dim, dtype=torch.float64))


def _spread(p: Tensor, ridge: float) -> Tensor:
    """One λ/ω for all queries."""
    return torch.full_like(p[..., :1], ridge)


def _fitted(p: Tensor, q: Tensor, k: Tensor, v: Tensor, ridge: float) -> Tensor:
    """The intercepts of weighted regressions, by their normal equations, one query after the other."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        group = h // (q.shape[1] // k.shape[1])
        z = k[b, group] - q[b, h, i]
        design = torch.cat((torch.ones(len(z), 1, dtype=z.dtype), z), dim=1)
        penalty = ridge * torch.eye(design.shape[1], dtype=z.dtype)
        penalty[0, 0] = 0.0
        weighted = design.T * p[b, h, i]
        out[b, h, i] = torch.linalg.solve(weighted @ design + penalty, weighted @ v[b, group])[0]
    return out


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_output_is_the_intercept_of_the_regression(
    kv_heads: int, causal: bool, relative: bool
) -> None:
    """λ beside exp(q·k/√d), or beside weights that sum to one."""
    layer = attlas.make(
        NAME, dim=16, heads=4, kv_heads=kv_heads, causal=causal, ridge=0.02, relative=relative
    ).double()
    q, k, v, inputs = _prepared(layer, 12)
    plain = {"scale": layer.scale, "mask": inputs.pairs, "score_mod": None, "q_offset": 0}
    w = ops.scores_of(q, k, **plain).exp()
    w = w / w.sum(-1, keepdim=True) if relative else w
    torch.testing.assert_close(layer.attend(q, k, v, inputs), _fitted(w, q, k, v, 0.02))


def test_a_small_ridge_costs_no_precision_where_keys_are_few() -> None:
    """What no key lies along of the query is ω/λ times as large in r, and nothing of it in weights."""
    layer = attlas.make(NAME, dim=32, heads=1, ridge=1e-3).double()
    q, k, _, inputs = _prepared(layer, 5)
    q, k = (3 * t.float() for t in (q, k))  # numbers that float32 holds
    exact, single = layer.weigh(q.double(), k.double(), inputs), layer.weigh(q, k, inputs)
    torch.testing.assert_close(single, exact.float())


def test_both_ways_of_writing_the_weights_agree() -> None:
    q, k = torch.randn(2, 3, 9, 4).double(), torch.randn(2, 3, 9, 4).double()
    p = (q @ k.mT).softmax(-1)
    z = k[:, :, None] - q[:, :, :, None]
    sigma = torch.einsum("bhij,bhijc,bhijd->bhicd", p, z, z) + 0.1 * torch.eye(4).double()
    mu = torch.einsum("bhij,bhijd->bhid", p, z)
    rho = torch.linalg.solve(sigma, mu)
    uncentred = p * (1 - (z @ rho[..., None])[..., 0]) / (1 - (rho * mu).sum(-1, keepdim=True))
    torch.testing.assert_close(sloped(p, k, slope(p, k, q, _spread(p, 0.1), 8)), uncentred)


@pytest.mark.parametrize(
    "options", [{"causal": True}, {"mask": masks.window(20), "position": "alibi"}]
)
def test_blocks_of_queries_agree_with_all_pairs_at_once(options: dict[str, object]) -> None:
    layer = attlas.make(NAME, dim=8, heads=2, **options).double()
    q, k, v, inputs = _prepared(layer, 300)
    found = layer.attend(q, k, v, inputs)
    torch.testing.assert_close(found, layer.weigh(q, k, inputs) @ v)


def test_weights_sum_to_one_and_some_are_negative() -> None:
    weights = attlas.make(NAME, dim=16, heads=2).double().weights(torch.randn(2, 20, 16).double())
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert bool((weights < 0).any())


def test_constant_weights_give_ridge_regression_on_all_keys() -> None:
    layer = attlas.make(NAME, dim=6, heads=1, ridge=0.3).double()
    layer.scale = 0.0
    q, k, v, inputs = _prepared(layer, 15)
    out = layer.attend(q, k, v, inputs)[:, 0]
    k, v, q = k[:, 0], v[:, 0], q[:, 0]
    centre, mean = k.mean(1, keepdim=True), v.mean(1, keepdim=True)
    moment = (k - centre).mT @ (k - centre) + 0.3 * torch.eye(6).double()
    slopes = torch.linalg.solve(moment, (k - centre).mT @ (v - mean))
    torch.testing.assert_close(out, mean + (q - centre) @ slopes)


def test_lines_are_found_exactly() -> None:
    """What no mean of values does: a linear map is told even at queries beyond all keys."""
    layer = attlas.make(NAME, dim=4, heads=1, ridge=1e-9, causal=False, steps=40).double()
    q, k, _, inputs = _prepared(layer, 30)
    true = torch.randn(4, 4).double()
    torch.testing.assert_close(
        layer.attend(q, k, k @ true + 1, inputs), q @ true + 1, rtol=1e-5, atol=1e-5
    )


def test_drifting_regression_is_followed_better_than_by_softmax_or_one_line() -> None:
    torch.manual_seed(3)
    tokens, width = 256, 4
    angle = torch.linspace(0, math.pi, tokens).double()
    k = torch.nn.functional.normalize(torch.randn(1, 1, tokens, width).double(), dim=-1)
    slopes = torch.stack((angle.cos(), angle.sin(), angle.cos() * 0.5, -angle.sin()), dim=-1)
    v = (k * slopes).sum(-1, keepdim=True)
    # The time of a key stands beside it, so that near means near in time too.
    timed = torch.cat((2 * k, 3 * torch.stack((angle.cos(), angle.sin()), -1)[None, None]), dim=-1)
    inside = torch.ones(tokens, tokens, dtype=torch.bool).tril(-1)

    def error(prediction: Tensor) -> float:
        return float((prediction - v)[:, :, 64:].square().mean())

    p = (timed @ timed.mT).masked_fill(~inside, -torch.inf).softmax(-1).nan_to_num()
    local = sloped(p, timed, slope(p, timed, timed, _spread(p, 1e-3), 30)) @ v
    uniform = (inside.double() / inside.sum(-1, keepdim=True).clamp(min=1))[None, None]
    one_line = sloped(uniform, timed, slope(uniform, timed, timed, _spread(uniform, 1e-3), 30)) @ v
    assert error(local) < 0.5 * min(error(p @ v), error(one_line))


def test_gradients_are_those_of_a_direct_solve() -> None:
    q, k = (torch.randn(1, 2, 7, 3, dtype=torch.float64) for _ in range(2))
    wanted, grads = torch.randn(1, 2, 7, 7, dtype=torch.float64), []
    for direct in (False, True):
        a, b = q.clone().requires_grad_(), k.clone().requires_grad_()
        p = (a @ b.mT).softmax(-1)
        ridge = 0.3 * (a @ b.mT).exp().sum(-1, keepdim=True) ** -1
        if direct:
            apart = b[:, :, None] - (p @ b)[:, :, :, None]
            c = torch.einsum("bhij,bhijc,bhijd->bhicd", p, apart, apart)
            eye = torch.eye(3).double()
            r = torch.linalg.solve(c + ridge[..., None] * eye, p @ b - a)
            weights = p * (1 - (apart @ r[..., None])[..., 0])
        else:
            weights = sloped(p, b, slope(p, b, a, ridge, 12))
        grads.append(torch.autograd.grad((weights * wanted).sin().sum(), (a, b)))
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("options", [{"ridge": 0.0}, {"ridge": -1.0}, {"steps": 0}])
def test_bad_options_are_named(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        attlas.make(NAME, dim=8, heads=2, **options)
