"""What the catalogue asks of bi-level routing; indices and outputs of the authors' code: `adapters`."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import attlas
from attlas.contract.layers.numbers import LargestTensor
from attlas.modules.biformer import BiLevelRouting
from attlas.tasks.train.digits import images


def made(**options: Any) -> BiLevelRouting:
    torch.manual_seed(0)
    given = {"channels": 8, "heads": 2, "regions": 3, "topk": 2, **options}
    return BiLevelRouting(**given).double()


def by_loops(module: BiLevelRouting, x: Tensor) -> Tensor:
    """The equations, region by region, over lists of the pixels that there are."""
    (_, height, width), count = x.shape, module.regions
    pixels = x.permute(1, 2, 0)
    q, k, v = (p(pixels) for p in (module.q_proj, module.k_proj, module.v_proj))
    tall, wide = -(-height // count), -(-width // count)
    places = [
        [(i, j) for i in range(a * tall, min((a + 1) * tall, height))
         for j in range(b * wide, min((b + 1) * wide, width))]
        for a, b in itertools.product(range(count), repeat=2)
    ]  # fmt: skip
    of = [lambda t, here=here: torch.stack([t[at] for at in here]) for here in places if here]
    out = torch.zeros(height, width, module.channels, dtype=x.dtype)
    for here, mine in zip([p for p in places if p], of, strict=True):
        affinity = torch.stack([mine(q).mean(0) @ each(k).mean(0) for each in of]).detach()
        order = affinity.argsort(descending=True)[: module.topk].tolist()
        shares = (affinity[order] * module.scale).softmax(0)
        shares = shares if module.soft_routing else torch.ones_like(shares)
        keys = torch.cat([s * of[n](k) for s, n in zip(shares, order, strict=True)])
        values = torch.cat([s * of[n](v) for s, n in zip(shares, order, strict=True)])
        for at in here:
            heads = [
                (q_h @ k_h.T * module.scale).softmax(-1) @ v_h
                for q_h, k_h, v_h in zip(
                    q[at].chunk(module.heads), keys.chunk(module.heads, 1), values.chunk(module.heads, 1),
                    strict=True,
                )
            ]  # fmt: skip
            out[at] = torch.cat(heads)
    if module.local is not None:
        out = out + module.local(v.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    return module.o_proj(out).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((6, 9), {}),
        ((7, 5), {}),
        ((7, 5), {"topk": 9}),
        ((4, 4), {"topk": 4}),
        ((2, 1), {}),
        ((6, 6), {"qk_dim": 4, "kernel_size": 5}),
        ((6, 6), {"kernel_size": None, "scale": 0.7}),
        ((6, 6), {"soft_routing": True, "topk": 3}),
    ],
)
def test_it_is_what_the_equations_say(sizes, options):
    module, x = made(**options), torch.randn(2, 8, *sizes).double()
    wanted = torch.stack([by_loops(module, image) for image in x])
    torch.testing.assert_close(module(x), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sizes", [(6, 9), (7, 5)])
def test_all_regions_give_full_attention_and_the_local_term(sizes):
    module, x = made(topk=9), torch.randn(2, 8, *sizes).double()
    tokens = x.flatten(2).mT
    q, k, v = (
        p(tokens).unflatten(-1, (2, -1)).transpose(1, 2)
        for p in (module.q_proj, module.k_proj, module.v_proj)
    )
    heads = nn.functional.scaled_dot_product_attention(q, k, v, scale=module.scale)
    local = module.local(v.transpose(1, 2).flatten(2).mT.unflatten(2, sizes))
    out = heads.transpose(1, 2).flatten(2) + local.flatten(2).mT
    wanted = module.o_proj(out).mT.unflatten(2, sizes)
    torch.testing.assert_close(module(x), wanted, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(made(topk=8)(x), wanted)


def test_the_block_engine_gives_the_same_for_the_lists_that_are_read():
    module, x = made(), torch.randn(2, 6, 9, 8).double()
    q, k, v = (p(x) for p in (module.q_proj, module.k_proj, module.v_proj))
    by_region = [module.split(t) for t in (q, k, v)]
    _, chosen = module.route(*by_region[:2], None)
    heads = [t.flatten(1, 2).unflatten(-1, (2, -1)).transpose(1, 2) for t in by_region]
    lists = chosen.sort(-1).values[:, None]
    found = attlas.ops.block_sparse(*heads, lists, size=6, scale=module.scale)
    wanted = module.split(module.attend(q, k, v))
    torch.testing.assert_close(found.transpose(1, 2).flatten(2), wanted.flatten(1, 2))


class Called(TorchDispatchMode):
    """Names of all operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_no_scatter_and_no_mask_of_all_pairs():
    """Nor does anything grow as n²: where regions keep their size, tensors grow with the pixels."""
    with torch.no_grad(), Called() as called:
        made()(torch.randn(1, 8, 7, 5).double())
    assert "index" in called.names
    assert not {n for n in called.names if "scatter" in n or "index_put" in n}
    held = []
    for side in (32, 64):
        module = BiLevelRouting(8, heads=2, regions=side // 4)
        with torch.no_grad(), LargestTensor() as seen:
            module(torch.randn(1, 8, side, side))
        held.append(seen.elements)
        assert seen.elements < 0.1 * side**4
    assert held[1] <= 4.05 * held[0]


def test_affinity_gets_no_gradient_and_the_read_regions_do():
    module, x = made(kernel_size=None), torch.randn(1, 8, 6, 6).double()
    q, k = (module.split(p(x.permute(0, 2, 3, 1))) for p in (module.q_proj, module.k_proj))
    weights, chosen = module.route(q, k, None)
    assert not weights.requires_grad
    given = x.clone().requires_grad_()
    module(given)[0, :, :2, :2].sum().backward()
    reached = module.split(given.grad.permute(0, 2, 3, 1)).abs().sum((0, 2, 3)) > 0
    assert reached.nonzero().flatten().tolist() == sorted({0, *chosen[0, 0].tolist()})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": 3}, "heads must divide channels=8, got 3"),
        ({"qk_dim": 5}, "heads must divide qk_dim=5, got 2"),
        ({"topk": 10}, "topk must be at most the 9 regions that there are, got 10"),
        ({"topk": 0}, "topk must be at least 1"),
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
    ],
)
def test_wrong_options_are_refused_by_name(options, said):
    with pytest.raises(ValueError, match=said):
        made(**options)


def test_a_small_classifier_learns_the_bundled_digits():
    """A convolutional network with routing in its blocks; 60 steps of 32 digits, where chance is 0.1.
    Measured on one thread: 0.602."""
    (pixels, classes), (unseen, truth) = images("train"), images("test")
    rng, steps = torch.Generator().manual_seed(1), 60
    torch.manual_seed(0)
    model = attlas.ConvNet(attlas.ConvNetConfig(
        num_channels=1, num_labels=10, hidden_sizes=[16, 32], depths=[1, 1],
        attention={"name": "biformer-routing", "heads": 2, "regions": 2, "topk": 2},
    ))  # fmt: skip
    adam = torch.optim.AdamW(model.parameters())
    plan = torch.optim.lr_scheduler.OneCycleLR(
        adam, 0.01, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    for _ in range(steps):
        chosen = torch.randint(len(pixels), (32,), generator=rng)
        model(pixels[chosen], labels=classes[chosen]).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        plan.step()
    with torch.no_grad():
        accuracy = (model(unseen).logits.argmax(-1) == truth).double().mean().item()
    assert accuracy > 0.4
