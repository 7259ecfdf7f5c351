"""Biases of distances: tables of them, and gradients along diagonals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

import attlas
from attlas import masks, ops
from attlas.ops import toeplitz
from attlas.ops.reference import indices
from attlas.positions import ALiBi, Positioned, ScoreMod, T5Bias, on_heads
from attlas.positions.base import by_distance, captured, from_table


@pytest.fixture
def untyped() -> Iterator[None]:
    """Shapes checked at run time are nothing that the compiler can trace."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def biases() -> dict[str, ScoreMod]:
    """Every score_mod of ours that trains a bias of distances, for four heads or for any."""
    prior = attlas.make("bayesian-attention-mechanism", dim=8, heads=4).position_encoding
    torch.nn.init.normal_(prior.loc)
    mega: Any = attlas.make("mega", dim=8, heads=1, max_positions=9)
    made = {"t5": T5Bias(4), "bam": prior, "mega": mega}
    return {name: module.double().score_mod for name, module in made.items()} | {
        "later heads": on_heads(T5Bias(6).double().score_mod, 2)  # type: ignore[dict-item]
    }


def pairs(queries: int, keys: int, offset: int) -> tuple[Tensor, ...]:
    return indices(torch.zeros(1, 4, queries, keys), offset)


@pytest.mark.parametrize("name", biases())
@pytest.mark.parametrize(
    ("queries", "keys", "offset"), [(7, 7, 0), (3, 9, 6), (9, 3, 2), (4, 6, -3), (1, 5, 90)]
)
def test_a_table_holds_what_the_score_mod_adds(name: str, queries: int, keys: int, offset: int) -> None:
    change = biases()[name]
    q, zero = torch.zeros(1, 4, queries, 8, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    table = toeplitz.table_of(change, q, keys, offset)
    assert table is not None
    wanted = change(zero, *pairs(queries, keys, offset)).expand(4, queries, keys)
    read = from_table(table)(zero, *pairs(queries, keys, offset))
    behind = from_table(table, offset)(zero, *pairs(queries, keys, 0))
    for found in (toeplitz.spread(table, queries, keys, offset), read, behind):
        torch.testing.assert_close(found, wanted)


def test_what_trains_nothing_or_looks_at_more_has_no_table() -> None:
    q, place = torch.zeros(1, 4, 5, 8), torch.arange(5)[None]
    for change in (None, ALiBi(4).score_mod, Positioned(T5Bias(4).score_mod, place, place)):
        assert toeplitz.table_of(change, q, 5, 0) is None
    assert by_distance(on_heads(ALiBi(4).score_mod, 1)) is None


def test_all_pairs_of_a_table_have_every_derivative() -> None:
    table = torch.randn(2, 13, dtype=torch.float64, requires_grad=True)

    def spread(table: Tensor) -> Tensor:
        return toeplitz.spread(table, 4, 5, 1)

    assert torch.autograd.gradcheck(spread, table)
    assert torch.autograd.gradgradcheck(spread, table)


@pytest.mark.parametrize("name", biases())
@pytest.mark.parametrize("mask", [None, masks.causal, masks.causal & masks.window(90)], ids=str)
@pytest.mark.parametrize(("queries", "keys", "offset"), [(300, 300, 0), (70, 300, 230), (130, 50, 0)])
def test_gradients_in_chunks(name: str, mask: Any, queries: int, keys: int, offset: int) -> None:
    shapes = (2, 4, queries, 8), (2, 2, keys, 8), (2, 1, keys, 6)
    tensors = [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]
    change = biases()[name]
    trained = [t for t in captured(change) if t.requires_grad]
    given: dict[str, Any] = {"mask": mask, "score_mod": change, "q_offset": offset}

    def gradients(out: Tensor, lse: Tensor) -> list[Tensor | None]:
        loss = out.square().sum() + lse[..., : queries // 2].exp().sum()
        return list(torch.autograd.grad(loss, tensors + trained, allow_unused=True))

    found = ops.memory_efficient(*tensors, **given, q_chunk=64, k_chunk=96)
    wanted = ops.reference(*tensors, **given, scale=8**-0.5)
    for a, b in zip(gradients(*found), gradients(*wanted), strict=True):
        torch.testing.assert_close(a, b)


def test_second_derivatives_in_chunks() -> None:
    bias = T5Bias(2, buckets=4, max_distance=4).double()
    tensors = [torch.randn(1, 2, 5, 4, dtype=torch.float64).requires_grad_() for _ in range(3)]

    def penalty(run: Any) -> Tensor:
        out, _ = run(*tensors, mask=masks.causal, score_mod=bias.score_mod, scale=0.5)
        (first,) = torch.autograd.grad(out.square().sum(), bias.weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), bias.weight)[0]

    torch.testing.assert_close(penalty(ops.memory_efficient), penalty(ops.reference))


def test_beside_flex_the_gradient_is_that_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention is not told that a table is trained; second derivatives are the definition's."""
    seen = []

    def flex(q: Tensor, k: Tensor, v: Tensor, *, table: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        seen.append(table.requires_grad)
        return ops.reference(q, k, v, score_mod=from_table(table), **given)

    monkeypatch.setattr(toeplitz, "flex", flex)
    monkeypatch.setattr(toeplitz.kernels, "refuses", lambda *_: None)
    monkeypatch.setattr(toeplitz.kernels, "work_of", lambda *_: object())
    monkeypatch.setattr(toeplitz.kernels, "gradient", lambda *given: torch.full_like(given[3], 7.0))
    q = torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True)
    table, weights = torch.randn(2, 11, dtype=torch.float64, requires_grad=True), torch.randn(4).double()
    out, _ = toeplitz.flex_biased(q, q, q, table, mask=None, scale=0.5, q_offset=0)
    assert (torch.autograd.grad(out.sum(), table, retain_graph=True)[0] == 7).all()

    def penalty(out: Tensor) -> tuple[Tensor, ...]:
        (found,) = torch.autograd.grad((out * weights).sum(), table, create_graph=True)
        return torch.autograd.grad(found.square().sum(), (q, table))

    wanted, _ = ops.reference(q, q, q, score_mod=from_table(table), scale=0.5)
    torch.testing.assert_close(penalty(out), penalty(wanted))
    with torch.no_grad():
        toeplitz.flex_biased(q, q, q, table, mask=None, scale=0.5, q_offset=0)
    monkeypatch.setattr(toeplitz.kernels, "work_of", lambda *_: None)  # too many tiles are cut
    toeplitz.flex_biased(q, q, q, table, mask=None, scale=0.5, q_offset=0)
    assert seen == [False, True, True]


@pytest.mark.filterwarnings(
    "ignore:flex_attention called without torch.compile", "ignore:Dynamo detected a call to a"
)
@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("compiled", [False, True])
def test_flex_reads_a_table(compiled: bool) -> None:
    if compiled and torch.__version__ < "2.12":
        pytest.skip("the compiler of PyTorch 2.11 stops at the checks of shapes in tests")
    bias = T5Bias(4)
    q, k, v = torch.randn(2, 4, 40, 16), torch.randn(2, 2, 60, 16), torch.randn(2, 2, 60, 16)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attend(q, k, v, mask=masks.causal, score_mod=bias.score_mod, route="flex")

    program = torch.compile(run, backend="eager", fullgraph=True) if compiled else run
    with torch.no_grad():
        wanted = ops.attend(q, k, v, mask=masks.causal, score_mod=bias.score_mod, route="reference")
        torch.testing.assert_close(program(q, k, v), wanted)


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize(("name", "options"), [("softmax", {"position": "t5"}), ("bam", {})])
def test_padding_leaves_distances_those_of_slots(name: str, options: Any, side: str) -> None:
    layer: Any = attlas.make(name, dim=16, heads=2, causal=True, **options).double()
    x, valid = torch.randn(2, 12, 16, dtype=torch.float64), torch.ones(2, 12, dtype=torch.bool)
    valid[0, : 4 if side != "right" else 0] = False
    valid[0, 12 if side == "left" else 9 :] = False
    _, k, _, inputs = layer.prepare(x, mask=valid)
    assert inputs.by_positions(layer.score_mod, k.shape[2]) is not None
    assert not isinstance(inputs.by_positions(layer.score_mod, k.shape[2]), Positioned)
    alone = layer(x[:1, valid[0]])
    torch.testing.assert_close(layer(x, mask=valid)[:1, valid[0]], alone)
    valid[1, 5] = False  # a gap, over which tokens are nearer than their slots
    _, k, _, inputs = layer.prepare(x, mask=valid)
    assert isinstance(inputs.by_positions(layer.score_mod, k.shape[2]), Positioned)
    alone = layer(x[1:, valid[1]])
    torch.testing.assert_close(layer(x, mask=valid)[1:, valid[1]], alone)
