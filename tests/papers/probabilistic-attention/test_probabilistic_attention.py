"""probabilistic-attention: softmax in its special case; keys and values adapt as the equations say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attlas


def _layer(**options):
    torch.manual_seed(0)
    made = attlas.make("probabilistic-attention", **{"dim": 16, "heads": 2, **options})
    return made.double().eval()


def _by_hand(layer, x: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and outputs of heads by the equations, distances and all."""
    q, zeta, mu = (
        p(x).unflatten(-1, (2, 8)).transpose(1, 2)
        for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    alpha = given.get("alpha", torch.tensor(layer.alpha))
    beta = given.get("beta", torch.tensor(layer.beta))
    log_prior = given.get("log_prior", torch.tensor(0.0))

    def weights() -> Tensor:
        columns_alpha, columns_beta = (
            p[..., None, :] if p.ndim else p for p in (alpha.double(), beta.double())
        )
        log_w = log_prior - columns_alpha / 2 * torch.cdist(q, zeta).square()
        if "initial" in given:
            log_w = log_w - columns_beta / 2 * torch.cdist(given["initial"], mu).square()
        if layer.magnitude_priors:
            log_w = log_w + columns_alpha / 2 * zeta.square().sum(-1)[..., None, :]
            log_w = log_w + columns_beta / 2 * mu.square().sum(-1)[..., None, :]
        return log_w.softmax(-1)

    def moved(mean: Tensor, points: Tensor, who: Tensor, precision: Tensor, prior) -> Tensor:
        w, precision = weights() * who, precision[..., None] if precision.ndim else precision
        pulled, total = w.mT @ points, w.sum(-2)[..., None]
        if prior is None:
            return pulled / total
        return (prior * mean + precision * pulled) / (prior + precision * total)

    for _ in range(layer.key_steps):
        zeta = moved(zeta, q, torch.ones(1), alpha, layer.key_prior)
    if "fixed" in given:
        for _ in range(layer.value_steps):
            values, known = given["fixed"].split((8, 1), dim=-1)
            mu = moved(mu, values, known, beta, layer.value_prior)
    return weights(), weights() @ mu


VARIANTS = (
    {},
    {"magnitude_priors": True, "beta": 0.3},
    {"key_steps": 3, "key_prior": 0.7, "value_steps": 2, "value_prior": 0.9, "beta": 0.3},
    {"magnitude_priors": True, "beta": 0.3, "key_steps": 2, "value_steps": 3, "alpha": 0.2},
    {"key_steps": 0, "value_steps": 2, "beta": 0.5, "value_prior": 2.0},
)


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("extras", [
    (), ("initial",), ("fixed",), ("alpha", "beta"), ("log_prior", "initial", "fixed"),
    ("alpha", "beta", "initial", "fixed"),
])  # fmt: skip
def test_probabilistic_attention_is_the_equations_after_each_step(options, extras) -> None:
    layer = _layer(**options)
    x, known = torch.randn(2, 7, 16).double(), torch.rand(2, 2, 7, 1).double() < 0.5
    known[..., 0, :] = True
    every = {
        "alpha": torch.rand(2, 2, 7).double() + 0.1,
        "beta": torch.rand(2, 2, 7).double() + 0.1,
        "log_prior": torch.randn(2, 2, 7, 7).double(),
        "initial": torch.randn(2, 2, 7, 8).double(),
        "fixed": torch.cat((torch.randn(2, 2, 7, 8).double() * known, known), dim=-1),
    }
    given = {name: every[name] for name in extras}
    weights, heads = _by_hand(layer, x, **given)
    torch.testing.assert_close(layer.weights(x, **given), weights)
    torch.testing.assert_close(layer.attend(*layer.prepare(x, extras=given)), heads)


def test_probabilistic_attention_without_steps_is_softmax_to_1e_5() -> None:
    layer = _layer(key_steps=0, magnitude_priors=True, alpha=8**-0.5).float()
    plain = attlas.make("softmax", dim=16, heads=2)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(layer(x), plain(x), atol=1e-5, rtol=0)


def test_probabilistic_attention_adapts_keys_upwards_in_likelihood() -> None:
    layer, x = _layer(), torch.randn(1, 12, 16).double()
    q, k, *_ = layer.prepare(x)
    keys, likelihoods = k, []
    for steps in range(6):
        distances = torch.cdist(q, keys).square()
        likelihoods.append(float((-layer.alpha / 2 * distances).logsumexp(-1).sum().detach()))
        layer.key_steps = steps
        columns = layer.weights(x).mT
        keys = columns / columns.sum(-1, keepdim=True) @ q
    assert likelihoods == sorted(set(likelihoods))


def _scene() -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of three objects, which object each is, and a guess that is often wrong."""
    torch.manual_seed(0)
    which = torch.arange(3).repeat_interleave(20)
    x = 3.0 * torch.eye(3, 16)[which] + 0.5 * torch.randn(60, 16)
    return x.double(), which, torch.nn.functional.one_hot(which.roll(9), 3).double()


def _iou(scores: Tensor, which: Tensor) -> float:
    found, wanted = scores.argmax(-1)[:, None] == torch.arange(3), which[:, None] == torch.arange(3)
    return float(((found & wanted).sum(0) / (found | wanted).sum(0)).mean())


def test_probabilistic_attention_propagates_clicks_faster_than_values_stand() -> None:
    x, which, guess = _scene()
    truth = torch.nn.functional.one_hot(which, 3).double()
    layer = _layer(heads=1, key_steps=0, value_prior=0.1, beta=4.0, alpha=1.0)
    with torch.no_grad():
        layer.q_proj.weight.copy_(torch.eye(16))
        layer.k_proj.weight.copy_(torch.eye(16))
    at_clicks = []
    for clicks in (0, 1, 2, 3, 6):
        clicked = torch.zeros(60, 1).double()
        clicked[[20 * (c % 3) + 7 * (c // 3) for c in range(clicks)]] = 1.0
        fixed = torch.zeros(60, 16).double()
        fixed[:, :3] = truth * clicked
        found = {}
        # What is fixed stands in both; only one of them carries it to the values of others.
        values = torch.zeros(60, 16).double()
        values[:, :3] = torch.where(clicked > 0, truth, guess)
        for steps in (0, 3):
            layer.value_steps = steps
            extras = {"fixed": torch.cat((fixed, clicked), dim=-1)[None, None]}
            q, k, v, inputs = layer.prepare(x[None], extras=extras)
            inputs.notes["means"] = values[None, None]
            found[steps] = _iou(layer.attend(q, k, v, inputs)[0, 0, :, :3], which)
        at_clicks.append((found[3], found[0]))
    carried, still = zip(*at_clicks, strict=True)
    assert carried[0] == still[0]
    assert all(a >= b for a, b in at_clicks)
    assert list(carried) == sorted(carried)
    assert carried[-1] > still[-1] + 0.2


@pytest.mark.parametrize("options", VARIANTS)
def test_probabilistic_attention_lets_no_padding_take_part(options) -> None:
    layer = _layer(**options)
    x, valid = torch.randn(2, 9, 16).double(), torch.arange(9) > 2
    fixed = torch.rand(2, 2, 9, 9).double().round()
    y = layer(x, mask=valid.expand(2, -1), fixed=fixed)[:, 3:]
    torch.testing.assert_close(y, layer(x[:, 3:], fixed=fixed[:, :, 3:]))


@pytest.mark.parametrize("options", VARIANTS)
def test_probabilistic_attention_survives_keys_that_no_query_is_near(options) -> None:
    layer = _layer(**options).float()
    x = (1e3 * torch.randn(1, 9, 16)).requires_grad_()
    hidden = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    hidden[..., 4] = False
    hidden[..., 2, :] = False
    for mask in (None, hidden):
        y = layer(x, mask=mask)
        (grad,) = torch.autograd.grad(y.square().mean(), x)
        assert y.isfinite().all()
        assert grad.isfinite().all()


def test_probabilistic_attention_adapts_a_copy_of_shared_keys_for_each_head() -> None:
    shared = _layer(heads=4, kv_heads=2, key_steps=2)
    whole = _layer(heads=4, key_steps=2)
    weights = shared.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        each = weights[name].unflatten(0, (2, 4)).repeat_interleave(2, dim=0)
        weights[name] = each.flatten(0, 1)
    whole.load_state_dict(weights)
    x = torch.randn(2, 7, 16).double()
    torch.testing.assert_close(shared(x), whole(x))


@pytest.mark.parametrize("name", ["alpha", "key_prior", "value_prior", "beta", "key_steps"])
def test_probabilistic_attention_refuses_what_is_no_precision(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        _layer(**{name: -1 if name == "key_steps" else -1.0})
    if name == "alpha":
        with pytest.raises(ValueError, match=name):
            _layer()(torch.randn(1, 5, 16).double(), alpha=torch.ones(1, 2, 4))
