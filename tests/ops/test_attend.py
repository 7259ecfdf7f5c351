"""The routes of `attend` agree with the definition, and `merge` puts parts together exactly."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attlas import masks, ops
from attlas.contract.layers.numbers import LargestTensor
from attlas.ops import backends
from attlas.ops.backends import loses_gradients
from attlas.ops.fused import Programs
from attlas.positions import ALiBi, T5Bias

# It is beartype, which looks at a random item of each list, that uses it.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Do not use the `random` module", "ignore:flex_attention called without torch.compile"
)

PATTERNS: dict[str, Any] = {
    "all": None,
    "causal": masks.causal,
    "window": masks.causal & (masks.window(60) | masks.sinks(3)),
    "padding": masks.padding(torch.arange(300) < torch.tensor([[300], [77]])),
    "heads": masks.per_head(masks.causal, masks.window(9), masks.full, masks.strided(7)),
    "documents": masks.document(torch.arange(300) // 64) & masks.causal,
}


def qkv(queries: int, keys: int, kv: int = 2, width: int = 6, **kind: Any) -> list[torch.Tensor]:
    kind = {"dtype": torch.float64, **kind}
    return [
        torch.randn(2, 4, queries, 8, **kind), torch.randn(2, kv, keys, 8, **kind),
        torch.randn(2, kv, keys, width, **kind),
    ]  # fmt: skip


def definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **given: Any) -> torch.Tensor:
    offset = k.shape[2] - q.shape[2]
    return ops.reference(q, k, v, scale=q.shape[-1] ** -0.5, q_offset=offset, **given)[0]


@pytest.mark.parametrize("route", ["auto", "sdpa", "chunked", "blocks"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("queries", "kv"), [(300, 4), (300, 1), (1, 2), (130, 2)])
def test_routes_agree(route: Any, pattern: str, queries: int, kv: int) -> None:
    mask = PATTERNS[pattern]
    if route == "blocks" and mask is None:
        pytest.skip("the route takes patterns alone")
    ours = [t.requires_grad_() for t in qkv(queries, 300, kv)]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    found, wanted = ops.attend(*ours, mask=mask, route=route), definition(*theirs, mask=mask)
    torch.testing.assert_close(found, wanted)
    found.square().sum().backward()
    wanted.square().sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("route", ["auto", "sdpa", "chunked"])
@pytest.mark.parametrize("position", [ALiBi(4), T5Bias(4)], ids=["alibi", "t5"])
@pytest.mark.parametrize("pattern", ["all", "causal", "window"])
def test_routes_agree_on_biases(route: Any, position: Any, pattern: str) -> None:
    q, k, v = qkv(300, 300)
    given = {"mask": PATTERNS[pattern], "score_mod": position.score_mod}
    torch.testing.assert_close(ops.attend(q, k, v, route=route, **given), definition(q, k, v, **given))


@pytest.fixture
def untyped() -> Iterator[None]:
    """Without shapes checked at run time, which neither flex can trace nor a user has."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("pattern", ["all", "causal", "window", "documents"])
def test_flex_agrees_without_gradients(pattern: str) -> None:
    q, k, v = qkv(300, 300, kv=4, width=8, dtype=torch.float32)
    found = ops.attend(q, k, v, mask=PATTERNS[pattern], route="flex")
    wanted = definition(q, k, v, mask=PATTERNS[pattern])
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("width", [4, 24])
def test_values_of_another_width_stay_fused_on_a_cpu(width: int) -> None:
    q, k, v = qkv(700, 700, width=width)
    with LargestTensor() as seen:
        found = ops.attend(q, k, v, mask=masks.causal)
    torch.testing.assert_close(found, definition(q, k, v, mask=masks.causal))
    assert seen.elements < 700 * 700


def test_a_bias_on_long_sequences_takes_no_quadratic_memory() -> None:
    q, k, v = qkv(1500, 1500, dtype=torch.float32)
    with LargestTensor() as seen:
        ops.attend(q, k, v, score_mod=ALiBi(4).score_mod)
    assert seen.elements < 1500 * 1500



def test_a_score_mod_that_is_no_bias() -> None:
    def capped(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return 5 * (score / 5).tanh()

    for length in (40, 300):
        q, k, v = qkv(length, length)
        found = ops.attend(q, k, v, score_mod=capped, mask=masks.causal)
        torch.testing.assert_close(found, definition(q, k, v, score_mod=capped, mask=masks.causal))
    with pytest.raises(ValueError, match="additive"):
        ops.attend(q, k, v, score_mod=capped, route="sdpa")


@pytest.mark.parametrize("route", ["auto", "reference", "sdpa", "chunked"])
def test_rows_that_see_nothing_give_zero(route: Any) -> None:
    q, k, v = (t.requires_grad_() for t in qkv(9, 9, width=8))
    visible = torch.ones(1, 1, 9, 9, dtype=torch.bool)
    visible[..., 2, :] = False
    out = ops.attend(q, k, v, mask=visible, route=route)
    assert (out[:, :, 2] == 0).all()
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()
    assert (q.grad[:, :, 2] == 0).all()


@given(cuts=st.lists(st.integers(1, 49), max_size=5, unique=True).map(sorted))
@settings(max_examples=25, deadline=None)
def test_any_split_of_the_keys_merges_exactly(cuts: list[int]) -> None:
    q, k, v = qkv(7, 50)
    edges = [0, *cuts, 50]
    parts = [
        ops.attend(q, k[:, :, a:b], v[:, :, a:b], return_lse=True)
        for a, b in pairwise(edges)
    ]
    out, lse = ops.merge(parts)
    whole = ops.attend(q, k, v, return_lse=True)
    torch.testing.assert_close(out, whole[0])
    torch.testing.assert_close(lse, whole[1])


def test_merge_with_a_part_that_sees_nothing() -> None:
    q, k, v = qkv(7, 50)
    blind = torch.zeros(1, 1, 7, 50, dtype=torch.bool)
    some = ops.attend(q, k, v, return_lse=True)
    none = ops.attend(q, k, v, mask=blind, return_lse=True)
    out, lse = ops.merge([none, some])
    torch.testing.assert_close(out, some[0])
    torch.testing.assert_close(lse, some[1])
    out, lse = ops.merge([none, none])
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    with pytest.raises(ValueError, match="at least one"):
        ops.merge([])


def test_dropout_drops_on_the_routes_that_have_it() -> None:
    q, k, v = qkv(300, 300, width=8)
    assert not torch.equal(ops.attend(q, k, v, dropout=0.5), ops.attend(q, k, v))
    with pytest.raises(ValueError, match="has no dropout"):
        ops.attend(q, k, v, dropout=0.5, route="chunked")


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"route": "sdap"}, "did you mean 'sdpa'"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"mask": torch.ones(1, 1, 3, 3, dtype=torch.bool)}, "mask must broadcast"),
        ({"mask": masks.per_head(masks.causal, masks.full)}, "mask is for 2 heads"),
        ({"mask": masks.causal, "return_lse": True, "route": "sdpa"}, "gives no lse"),
        ({"k": torch.randn(2, 3, 50, 8)}, r"heads of k \(3\) must divide"),
        ({"k": torch.randn(2, 2, 50, 7)}, "k must be as wide as q"),
        ({"v": torch.randn(2, 2, 49, 8)}, "v must have as many tokens"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    q, k, v = qkv(7, 50, dtype=torch.float32)
    with pytest.raises(ValueError, match=said):
        ops.attend(**{"q": q, "k": k, "v": v, **change})


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("route", ["auto", "reference", "sdpa", "blocks", "chunked", "flex"])
def test_nothing_on_every_route(route: Any) -> None:
    """No keys give 0 and lse −∞, no sequences nothing, a scale of 0 the mean of what is seen."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 9, 8) for _ in range(3))
    pattern = masks.causal & masks.window(40)
    given: dict[str, Any] = {"mask": pattern, "route": route}
    assert not ops.attend(q, k[:, :, :0], v[:, :, :0], **given).any()
    assert ops.attend(q[:0], k[:0], v[:0], **given).shape == (0, 2, 9, 8)
    flat = ops.attend(q, k, v, scale=0.0, **given)
    torch.testing.assert_close(flat, v.cumsum(2) / torch.arange(1, 10)[:, None])


def test_a_shard_without_keys_merges() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3))
    none = ops.attend(q, k[:, :, :0], v[:, :, :0], return_lse=True)
    assert (none[1] == -torch.inf).all()
    out, lse = ops.merge([none, ops.attend(q, k, v, return_lse=True)])
    torch.testing.assert_close(out, ops.attend(q, k, v))
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()
    both, lse = ops.merge([none, none])
    assert not both.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize(
    ("queries", "keys", "masked", "lost"),
    [
        (192, 192, True, True), (192, 192, False, False), (128, 128, True, False),
        (160, 160, True, False), (5, 64, True, True), (1, 100, False, True),
    ],
)  # fmt: skip
def test_where_cudnn_may_lose_gradients(queries: int, keys: int, masked: bool, lost: bool) -> None:
    q, k = torch.randn(1, 1, queries, 8), torch.randn(1, 1, keys, 8)
    arguments = {"attn_mask": torch.ones(queries, keys, dtype=torch.bool) if masked else None}
    assert loses_gradients(q, k, arguments) == lost
    assert loses_gradients(q, k, {**arguments, "dropout_p": 0.1})


@pytest.mark.parametrize("values", [2, 4])
def test_the_last_query_alone_sees_all_that_is_causal(values: int) -> None:
    q, k, v = qkv(1, 9)
    v = v.repeat_interleave(values // 2, dim=1)
    seen = ops.attend(q, k, v, mask=masks.causal)
    torch.testing.assert_close(seen, ops.attend(q, k, v))
    earlier = ops.attend(q, k, v, mask=masks.causal, q_offset=7)
    torch.testing.assert_close(earlier, ops.attend(q, k[:, :, :8], v[:, :, :8]))


@pytest.mark.usefixtures("untyped")
def test_a_program_for_any_sizes() -> None:
    program = torch.compile(_causal, fullgraph=True, backend="eager", dynamic=True)
    for queries, keys in ((5, 5), (1, 9), (3, 9)):
        call = qkv(queries, keys)
        torch.testing.assert_close(program(*call), _causal(*call))


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return ops.attend(q, k, v, mask=masks.causal)


def laid(x: torch.Tensor, first: str) -> torch.Tensor:
    """[batch, heads, tokens, dim], as tokens or heads come first in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if first == "tokens" else x.contiguous()


@pytest.mark.parametrize("values", ["tokens", "heads"])
@pytest.mark.parametrize("given", ["tokens", "heads", "expanded"])
def test_gradients_come_in_one_layout(values: str, given: str) -> None:
    """Where cuDNN may give them, whose plans PyTorch keeps without the layout of the gradient."""
    tensors = [laid(torch.randn(2, 3, 5, 8), values).requires_grad_() for _ in range(3)]
    direction = torch.randn(2, 1, 5, 1).expand(2, 3, 5, 8)
    direction = direction if given == "expanded" else laid(direction, given)
    plain = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True)
    out = backends._called(backends.DEFAULT, *tensors, {"is_causal": True}, True)
    torch.testing.assert_close(out, plain)
    seen: list[torch.Tensor] = []
    out.register_hook(seen.append)  # called behind ours
    found = torch.autograd.grad(out, tensors, direction)
    torch.testing.assert_close(found, torch.autograd.grad(plain, tensors, direction))
    assert seen[0].equal(direction)
    assert seen[0].transpose(1, 2).is_contiguous()


def test_gradients_that_cudnn_loses_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def among(names: tuple[str, ...], q: torch.Tensor, *rest: Any) -> torch.Tensor:
        asked.append(names)
        return q

    monkeypatch.setattr(backends, "_among", among)
    q = torch.randn(1, 2, 1, 8)
    for name, trains in (("cudnn", True), (backends.DEFAULT, True), ("cudnn", False), ("flash", True)):
        backends._called(name, q, q, q, {}, trains)
    assert asked == [backends._SOUND, backends._SOUND, ("cudnn",), ("flash",)]


def test_a_backend_is_chosen_for_one_call_alone() -> None:
    """As `sdpa_kernel` chooses it, also where the call fails, and within another choice."""
    q = torch.randn(1, 2, 4, 8)

    def allowed() -> list[bool]:
        return [enabled() for enabled, _ in backends._SWITCHES.values()]

    before = allowed()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        within = allowed()
        out = backends._among(("math",), q, q, q, {})
        with pytest.raises(RuntimeError):
            backends._among(("math",), q, q, q[..., :3, :], {})
        assert allowed() == within != before
    assert allowed() == before
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q))


def test_how_often_a_function_is_compiled_is_told_for_some_calls_alone() -> None:
    config = torch._dynamo.config
    before = config.recompile_limit

    def fails() -> None:
        with Programs(77):
            with Programs(99):
                assert config.recompile_limit == 99
            assert config.recompile_limit == 77
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert config.recompile_limit == before
