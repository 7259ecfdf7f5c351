"""key-driven-gqa's variants: allocations that follow the change of norms; noise on what heads give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attlas

X = torch.randn(3, 11, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _layer(name: str, **options):
    torch.manual_seed(0)
    return attlas.make(name, **{"dim": 32, "heads": 8, **options}).double()


def _batches(number: int) -> Tensor:
    """Batches whose norms differ from one group of four to the next, and change."""
    return torch.randn(number, 3, 11, 32, dtype=torch.float64)


def _keys(layer, x: Tensor) -> Tensor:
    return layer.k_proj(x).unflatten(-1, (layer.kv_heads, -1)).transpose(1, 2)


def _split_by(layer, x: Tensor, sizes: list[int]) -> Tensor:
    """The output when group g serves the next sizes[g] query heads, one head after the other."""
    q = layer.q_proj(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    k, v = (p(x).unflatten(-1, (layer.kv_heads, -1)).transpose(1, 2)
            for p in (layer.k_proj, layer.v_proj))  # fmt: skip
    group = [g for g, size in enumerate(sizes) for _ in range(size)]
    heads = [(q[:, h] @ k[:, g].mT / 2).softmax(-1) @ v[:, g] for h, g in enumerate(group)]
    return layer.o_proj(torch.cat(heads, dim=-1))


def _shares(by: str, norms: Tensor, stored: Tensor) -> Tensor:
    return (norms - stored).abs() if by == "change" else 0.9 * norms + 0.1 * stored


@pytest.mark.parametrize("by", ["change", "average"])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_key_driven_gqa_dynamic_follows_the_norms_in_training(by: str, window: int) -> None:
    """The authors' steps told anew, with their sums over the batch; no rounding here needs a repair."""
    layer = _layer("dynamic-gqa", kv_heads=4, window=window, by=by).train()
    with torch.no_grad():
        layer.k_proj.weight *= torch.tensor([3.0, 1.0, 1.0, 3.0]).repeat_interleave(4)[:, None]
    stored, sizes, seen = torch.zeros(4, dtype=torch.float64), [2, 2, 2, 2], set()
    for step, x in enumerate(_batches(10)):
        if step % window == 0:
            norms = torch.linalg.vector_norm(_keys(layer, x).detach(), dim=(2, 3)).sum(0)
            shares = _shares(by, norms, stored)
            counts = (8 * shares / shares.sum()).round().long()
            if counts.sum() == 8:
                sizes = counts.tolist()
            stored = (stored + norms) / window
        y = layer(x)
        if counts.sum() == 8:
            assert layer.sizes.tolist() == sizes
        else:  # as few heads moved as bring the sum back to 8
            sizes = layer.sizes.tolist()
            assert (layer.sizes - counts).abs().sum() == (counts.sum() - 8).abs()
        assert sum(sizes) == 8
        seen.add(tuple(sizes))
        torch.testing.assert_close(y, _split_by(layer, x, sizes))
        torch.testing.assert_close(3 * layer.stored, stored)
    assert (2, 2, 2, 2) not in seen


def test_key_driven_gqa_dynamic_keeps_an_allocation_for_a_window() -> None:
    layer = _layer("dynamic-gqa", kv_heads=2, window=4).train()
    sizes = []
    for step, x in enumerate(_batches(8)):
        with torch.no_grad():
            layer.k_proj.weight[:4] *= 10 if step == 1 else 1
            layer(x)
        sizes.append(layer.sizes.tolist())
    assert sizes == 4 * [[4, 4]] + 4 * [[7, 1]]


@pytest.mark.parametrize("by", ["change", "average"])
def test_key_driven_gqa_dynamic_measures_each_sequence_against_what_training_stored(
    by: str,
) -> None:
    layer = _layer("dynamic-gqa", kv_heads=4, window=2, by=by).train()
    for x in _batches(5):
        layer(x)
    layer.eval()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    scaled = X * torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)[:, None, None]
    norms = torch.linalg.vector_norm(_keys(layer, scaled), dim=(2, 3))
    shares = _shares(by, norms, layer.stored)
    counts = (8 * shares / shares.sum(-1, keepdim=True)).round().long()
    ours = layer.counts(norms.detach())
    assert (ours.sum(-1) == 8).all()
    assert ((ours - counts).abs().sum(-1) == (counts.sum(-1) - 8).abs()).all()
    # Neither what came before nor what is beside changes anything.
    torch.testing.assert_close(layer(scaled)[2:], layer(scaled[2:]))
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(value, state[name], atol=0, rtol=0)
    layer.over = "batch"
    counts = layer.counts(layer.norms(_keys(layer, scaled), layer.prepare(X)[-1]))
    assert (counts == counts[:1]).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("by", ["change", "average"])
def test_key_driven_gqa_dynamic_with_equal_norms_is_grouped_query(by: str, training: bool) -> None:
    layer = _layer("dynamic-gqa", kv_heads=2, by=by, window=1).train(training)
    with torch.no_grad():  # the same rows in another order have the same norm
        layer.k_proj.weight[4:] = layer.k_proj.weight[:4].flip(0)
    plain = attlas.make("gqa", dim=32, heads=8, kv_heads=2).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    for x in (X, 2 * X, 2 * X.flip(0)):
        torch.testing.assert_close(layer(x), plain(x))


def test_key_driven_gqa_dynamic_without_any_change_has_equal_groups() -> None:
    layer = _layer("dynamic-gqa", kv_heads=4, over="batch").eval()
    layer.stored.copy_(layer.norms(_keys(layer, X), layer.prepare(X)[-1])[0])
    torch.testing.assert_close(layer(X), _split_by(layer, X, [2, 2, 2, 2]))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_key_driven_gqa_dynamic_under_gradient_checkpointing_is_the_same(
    use_reentrant: bool,
) -> None:
    """A pass that is run again for its gradient gets the same groups and counts once."""
    results = []
    for again in (False, True):
        layer = _layer("dynamic-gqa", kv_heads=4, window=1).train()
        for x in _batches(4):
            x.requires_grad_()
            y = checkpoint(layer, x, use_reentrant=use_reentrant) if again else layer(x)
            y.square().sum().backward()
        gradients = {f"{n} gradient": p.grad for n, p in layer.named_parameters()}
        results.append({**layer.state_dict(), **gradients})
    assert int(results[0]["passes"]) == 4
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value)


def _flat(layer, x: Tensor) -> Tensor:
    """What the heads of grouped-query attention give, [batch, groups, heads of a group, numbers]."""
    q, k, v, inputs = layer.prepare(x)
    return layer.attend(q, k, v, inputs).flatten(2).unflatten(1, (layer.kv_heads, -1))


def _projected(layer, heads: Tensor) -> Tensor:
    return layer.o_proj(heads.flatten(1, 2).unflatten(-1, (11, -1)).transpose(1, 2).flatten(2))


def test_key_driven_gqa_perturbed_takes_standardised_noise_off_in_training() -> None:
    """The authors' noise told anew, group by group, with the same draws."""
    layer = _layer("perturbed-gqa", kv_heads=4, bias=True).train()
    heads = _flat(layer, X)
    torch.manual_seed(1)
    drawn = torch.rand(8, 11, 4, dtype=torch.float64).view(4, 2, 44)
    wanted = []
    for group in range(4):
        noise = drawn[group].clone()
        noise[0, 0] = noise[1, 1] = 0
        noise = (noise - noise.mean(-1, keepdim=True)) / noise.std(-1, keepdim=True)
        own = heads[:, group]
        wanted.append(own - (noise * own.std(-1, keepdim=True) + own.mean(-1, keepdim=True)))
    torch.manual_seed(1)
    torch.testing.assert_close(layer(X), _projected(layer, torch.stack(wanted, dim=1)))


def test_key_driven_gqa_perturbed_takes_the_noise_s_mean_off_in_evaluation() -> None:
    layer = _layer("perturbed-gqa", kv_heads=4)
    heads = _flat(layer, X)
    y = layer.eval()(X)
    torch.testing.assert_close(y, _projected(layer, heads - heads.mean(-1, keepdim=True)))
    torch.manual_seed(0)
    with torch.no_grad():
        mean = torch.stack([layer.train()(X) for _ in range(2000)]).mean(0)
    # All but the first token, where the zeros of the diagonal are.
    assert (mean - y)[:, 1:].std() < 0.1 * y.std()


def test_key_driven_gqa_perturbed_leaves_padding_out_of_means_and_deviations() -> None:
    layer = _layer("perturbed-gqa", kv_heads=4)
    valid = torch.ones(3, 14, dtype=torch.bool)
    valid[:, 11:] = False
    padded = torch.cat((X, 10 * torch.randn(3, 3, 32, dtype=torch.float64)), dim=1)
    torch.testing.assert_close(layer.eval()(padded, mask=valid)[:, :11], layer(X))
    torch.nn.init.eye_(layer.o_proj.weight)
    outputs = []
    for junk in (1.0, 7.0):
        x = torch.cat((X, junk * padded[:, 11:]), dim=1)
        torch.manual_seed(2)
        outputs.append(layer.train()(x, mask=valid)[:, :11])
    torch.testing.assert_close(*outputs)
    means = outputs[0].unflatten(-1, (8, 4)).mean((1, 3))
    torch.testing.assert_close(means, torch.zeros_like(means))


@pytest.mark.parametrize("name", ["dynamic-gqa", "perturbed-gqa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_key_driven_gqa_variants_train_on_anything(name: str, dtype: torch.dtype) -> None:
    """Rows that are all alike, a single token, and nothing but padding: finite gradients."""
    layer = _layer(name, kv_heads=4).to(dtype).train()
    alike, single = X[:, :1].repeat(1, 5, 1).to(dtype), X[:, :1].to(dtype)
    for x, mask in ((alike, None), (single, None), (alike, torch.zeros(3, 5, dtype=torch.bool)),
                    (torch.zeros_like(alike), None)):  # fmt: skip
        layer.zero_grad()
        y = layer(x, mask=mask)
        y.float().square().sum().backward()
        assert y.isfinite().all()
        assert y.dtype == dtype
        assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_key_driven_gqa_variants_refuse_what_they_cannot_honour() -> None:
    refused = [
        ("dgqa", {"window": 0}), ("dgqa", {"by": "norm"}), ("dgqa", {"over": "layer"}),
        ("dgqa", {"causal": True}), ("pgqa", {"causal": True}), ("pgqa", {"kv_heads": 3}),
    ]  # fmt: skip
    for name, options in refused:
        with pytest.raises((ValueError, TypeError), match=next(iter(options))):
            _layer(name, **options)
