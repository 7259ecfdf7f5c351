"""titans-neural-memory: a network that learns while it reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm
from torch.utils.flop_counter import FlopCounterMode

import attlas
from attlas import ops

NAME = "titans-neural-memory"


def _layer(**options: object) -> torch.nn.Module:
    options = {"dim": 8, "heads": 2, "chunk": 3, "kernel": 3, "expansion": 1.5, **options}
    layer = attlas.make(NAME, **options).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer


def _never_forget(layer: torch.nn.Module) -> None:
    with torch.no_grad():
        layer.decay_proj.weight.zero_()
        layer.decay_proj.bias.fill_(-1e4)


def _x(tokens: int = 17, batch: int = 2) -> Tensor:
    return torch.randn(batch, tokens, 8, dtype=torch.float64)


def _token_by_token(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """From the definition, one row and head and token after the other, gradients by autograd."""
    q, k, v, inputs = layer.prepare(x)
    gates, size = layer.gates(inputs), layer.chunk
    heads = torch.zeros_like(q)

    def network(weights: list[Tensor], z: Tensor) -> Tensor:
        y = z
        for i, weight in enumerate(weights[: layer.memory.depth]):
            y = (gelu(y) if i else y) @ weight
        return layer_norm(y, y.shape[-1:]) * (1 + weights[-1]) + z if layer.memory.residual else y

    for b, h in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:2])).tolist():
        weights = [w[h].detach().clone() for w in layer.memory.first]
        base, surprise = weights, [torch.zeros_like(w) for w in weights]
        for t in range(x.shape[1]):
            if (t + 1) % size == 0:
                now = slice(t + 1 - size, t + 1)
                leaves = [w.detach().clone().requires_grad_() for w in base]
                apart = (network(leaves, k[b, h, now]) - v[b, h, now]).square().mean(-1)
                grads = torch.autograd.grad((gates[b, h, now, 0] * apart).sum(), leaves)
                forget = gates[b, h, now, 1].mean().sigmoid()
                carry = gates[b, h, now, 2].mean().sigmoid() if layer.momentum else 0.0
                surprise = [carry * s - g for s, g in zip(surprise, grads, strict=True)]
                weights = [(1 - forget) * w + s for w, s in zip(weights, surprise, strict=True)]
                if layer.batch and (t + 1) % layer.batch == 0:
                    base = weights
            heads[b, h, t] = network(weights, q[b, h, t])
    return layer.output(heads, inputs)


@pytest.mark.parametrize(
    "options",
    [{}, {"chunk": 1}, {"batch": 6}, {"chunk": 1, "batch": 4}, {"chunk": 1, "batch": 1},
     {"depth": 3, "batch": 3}, {"depth": 1, "residual": False}, {"momentum": False, "batch": 3},
     {"qk_norm": "rms", "activation": False, "kernel": 1}, {"chunk": 32}],
)  # fmt: skip
def test_scans_give_what_the_definition_gives(options: dict[str, object]) -> None:
    layer, x = _layer(**options), _x()
    torch.testing.assert_close(layer(x), _token_by_token(layer, x))


def test_a_linear_memory_without_momentum_and_forgetting_is_the_delta_rule() -> None:
    layer = _layer(chunk=1, batch=1, depth=1, residual=False, momentum=False)
    _never_forget(layer)
    q, k, v, inputs = layer.prepare(_x(40))
    beta = 2 * layer.gates(inputs)[..., 0] / layer.head_dim
    first = layer.memory.first[0].expand(len(q), -1, -1, -1)
    wanted, _ = ops.recurrence(q, k, v, beta=beta, initial_state=first)
    torch.testing.assert_close(layer.attend(q, k, v, inputs), wanted)


def test_larger_batches_differ_from_the_latest_weights_by_the_square_of_the_step() -> None:
    """What is written is of the step's order; where gradients are taken, of the next."""
    layer, x = _layer(chunk=1), _x(24)
    _never_forget(layer)

    def read(batch: int | None, step: float) -> Tensor:
        layer.batch, layer.max_step = batch, step
        return layer(x).detach()

    blank = read(None, 0.0)
    for batch in (2, 8, None):
        written, apart = zip(*(
            ((read(1, step) - blank).norm(), (read(batch, step) - read(1, step)).norm())
            for step in (1e-3, 1e-4)
        ), strict=True)  # fmt: skip
        assert 8 < written[0] / written[1] < 12
        assert 50 < apart[0] / apart[1] < 150


@pytest.mark.parametrize("residual", [False, True])
def test_what_was_written_can_be_read(residual: bool) -> None:
    """Keys that come again find their values, the better the more often they came."""
    layer = attlas.make(
        NAME, dim=16, heads=1, chunk=1, batch=1, kernel=1, max_step=4.0, momentum=False,
        residual=residual,
    ).double()  # fmt: skip
    _never_forget(layer)
    x = torch.randn(1, 6, 16, dtype=torch.float64).repeat(1, 20, 1)
    _, k, v, inputs = layer.prepare(x)
    first = layer.memory(layer.memory.row()[None], k) - v
    read = layer.attend(k.roll(-1, 2), k, v, inputs)[:, :, :-1]  # each key one token too early
    error = (read - v[:, :, 1:]).square().mean((0, 1, 3)).detach()
    assert error[-6:].mean() < 0.1 * first.square().mean()


@pytest.mark.parametrize("options", [{}, {"batch": 6}, {"chunk": 1, "batch": 4}, {"batch": 3}])
def test_padding_between_tokens_is_stepped_over_with_a_cache_too(options: dict[str, int]) -> None:
    layer, x = _layer(**options), _x(24)
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


@pytest.mark.parametrize("sizes", [[1] * 17, [5, 1, 1, 10], [2, 2, 13]])
@pytest.mark.parametrize("options", [{"batch": 6}, {"chunk": 1, "batch": 4}, {"batch": 3}, {}])
def test_passes_with_a_cache_go_on_where_the_one_before_stopped(
    sizes: list[int], options: dict[str, int]
) -> None:
    layer, x = _layer(**options), _x()
    cache = layer.init_cache()
    parts = [layer(part, cache=cache) for part in x.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x))


def test_half_precision_stays_near_the_exact_result() -> None:
    """Its memory is written in float32, so that only inputs and projections are rounded."""
    layer, x = attlas.make(NAME, dim=8, heads=2, chunk=3).double(), _x(48).bfloat16()
    exact = layer(x.double())
    found = layer.bfloat16()(x).double()
    assert (found - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    "options",
    [{"chunk": 0}, {"batch": 4}, {"batch": 0}, {"depth": 0}, {"expansion": 0.0}, {"kernel": 0},
     {"max_step": 0.0}, {"kv_heads": 1}, {"dropout": 0.1}, {"position": "alibi"}],
)  # fmt: skip
def test_bad_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        attlas.make(NAME, **{"dim": 8, "heads": 2, "chunk": 3, **options})


def test_a_map_of_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="weights"):
        _layer().weights(_x())


def test_operations_are_counted_while_it_learns_from_gradients() -> None:
    """The counter hooks into calls of modules, of which there must be none while a gradient is taken."""
    layer = attlas.make(NAME, dim=8, heads=2, chunk=3, kernel=1, expansion=1.0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(_x(6).float())
    assert counter.get_total_flops() > 0
