"""`ops.recurrence`: all forms against the definition, token by token, written out here once more."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config
from torch import Tensor

from attlas import ops
from attlas.ops.recurrence_forms import LEAST

UPDATES = ("plain", "head", "token", "channel", "delta", "gated delta", "channel delta", "low rank")
DIM, WIDTH, HEADS = 8, 5, 2


def terms(update: str, tokens: int, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    """Arguments of a call, float64."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(batch, HEADS, *shape, generator=g, dtype=torch.float64)

    unit = torch.nn.functional.normalize(random(tokens, DIM), dim=-1)
    call: dict[str, Any] = {"q": random(tokens, DIM), "k": unit, "v": random(tokens, WIDTH)}
    strength = random(tokens).sigmoid()
    each = -random(tokens, DIM).abs() * 0.3
    if update == "head":
        call["log_decay"] = -torch.rand(HEADS, generator=g, dtype=torch.float64)
    elif update in ("token", "gated delta"):
        call["log_decay"] = each[..., 0]
    elif update != "plain" and update != "delta":
        call["log_decay"] = each
    if "delta" in update:
        call["beta"] = strength
    if update == "low rank":
        call["low_rank"] = (-unit, unit * random(tokens, DIM).sigmoid())
    return call


def definition(call: dict[str, Any], state: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """S_t = (diag(α_t) + a_t b_tᵀ) S_{t−1} + k_t v_tᵀ, y_t = scale · S_tᵀ q_t, one token at a time."""
    q, k, v = call["q"], call["k"], call["v"]
    decay, beta = call.get("log_decay"), call.get("beta")
    outs = []
    for t in range(q.shape[2]):
        alpha = torch.ones_like(q[:, :, t])
        if decay is not None:
            at = decay[:, None] if decay.ndim == 1 else decay[:, :, t]
            alpha = alpha * (at if decay.ndim == 4 else at.reshape(-1, HEADS, 1)).exp()
        key, value = k[:, :, t, :, None], v[:, :, t, None]
        change = torch.diag_embed(alpha)
        if beta is not None:  # (I − β k kᵀ) diag(α), the value written with the same β
            strength = beta[:, :, t, None, None]
            change = (torch.eye(DIM, dtype=q.dtype) - strength * key @ key.mT) @ change
            value = strength * value
        if "low_rank" in call:
            a, b = (x[:, :, t, :, None] for x in call["low_rank"])
            change = change + a @ b.mT
        state = change @ state + key @ value
        outs.append(scale * q[:, :, t, None] @ state)
    return torch.cat(outs, dim=2), state


def near(found: Tensor, expected: Tensor, bound: float = 1e-10) -> bool:
    return bool((found - expected).abs().max() <= bound * (1 + expected.abs().max()))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000])
def test_forms_agree_with_the_definition(update: str, tokens: int) -> None:
    call = terms(update, tokens)
    state = torch.randn(1, HEADS, DIM, WIDTH, dtype=torch.float64)
    out, last = definition(call, state, scale=0.3)
    forms = [("step", 64), ("parallel", 64), *(("chunked", size) for size in (16, 32, 64, 128))]
    for form, size in forms:
        options = {"scale": 0.3, "initial_state": state, "form": form, "chunk_size": size}
        found, found_last = ops.recurrence(**call, **options)
        assert near(found, out), (form, size)
        assert near(found_last, last), (form, size)


@settings(max_examples=25, deadline=None)
@given(
    update=st.sampled_from(UPDATES),
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    size=st.sampled_from([1, 4, 16]),
    normalize=st.booleans(),
)
def test_packed_sequences_are_sequences(
    update: str, lengths: list[int], size: int, normalize: bool
) -> None:
    if not sum(lengths):
        return
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    call = terms(update, sum(lengths))
    call["q"], call["k"] = call["q"].abs(), call["k"].abs()
    states = torch.rand(len(lengths), HEADS, DIM, WIDTH + normalize, dtype=torch.float64)
    options = {"normalize": normalize, "chunk_size": size}
    out, last = ops.recurrence(**call, initial_state=states, cu_seqlens=offsets, **options)
    for n, (begin, stop) in enumerate(pairwise(offsets.tolist())):
        part = {name: _cut(x, begin, stop) for name, x in call.items()}
        alone, alone_last = ops.recurrence(**part, initial_state=states[n : n + 1], **options)
        assert near(out[:, :, begin:stop], alone) if stop > begin else True
        assert near(last[n : n + 1], alone_last)


def _cut(x: Any, begin: int, stop: int) -> Any:
    if isinstance(x, tuple):
        return tuple(_cut(y, begin, stop) for y in x)
    return x if x.ndim == 1 else x[:, :, begin:stop]


@pytest.mark.parametrize("update", ["plain", "head", "token", "channel"])
def test_two_sided(update: str) -> None:
    """A token of itself once, and of those behind it as of those before, by the decays in between."""
    call = terms(update, 37, batch=2)
    out, state = ops.recurrence(**call, causal=False, chunk_size=16)
    decay = call.get("log_decay")
    g = torch.zeros(2, HEADS, 37, DIM, dtype=torch.float64)
    if decay is not None:
        g = g + (decay[None, :, None, None] if decay.ndim == 1 else decay.reshape(2, HEADS, 37, -1))
    ahead, back = g.cumsum(2), g.flip(2).cumsum(2).flip(2)
    until = (ahead[:, :, :, None] - ahead[:, :, None]).clamp(max=0.0)
    since = (back[:, :, :, None] - back[:, :, None]).clamp(max=0.0)
    earlier = torch.ones(37, 37, dtype=torch.bool).tril()[..., None]
    pairs = call["q"][:, :, :, None] * call["k"][:, :, None]
    weights = (pairs * until.where(earlier, since).exp()).sum(-1)
    assert state is None
    assert near(out, weights @ call["v"])


def test_normalised_outputs_are_means() -> None:
    call = terms("token", 50)
    call["q"], call["k"] = call["q"].abs(), call["k"].abs()
    out, _ = ops.recurrence(**call, normalize=True)
    sums, _ = ops.recurrence(**call)
    ones, _ = ops.recurrence(**{**call, "v": torch.ones_like(call["v"])})
    assert near(out, sums / ones)
    assert bool((out <= call["v"].amax(2, keepdim=True) + 1e-12).all())
    call["k"] = torch.zeros_like(call["k"])
    assert not ops.recurrence(**call, normalize=True)[0].any()


@pytest.mark.parametrize("update", ["token", "channel", "gated delta", "low rank"])
def test_extreme_decays(update: str) -> None:
    """Of 0, of 1 and of 1e-30, side by side: no overflow, the definition still, finite gradients."""
    call = terms(update, 200)
    pick = torch.rand_like(call["log_decay"])
    decay = torch.full_like(pick, -1e-3).masked_fill(pick < 0.6, 0.0).masked_fill(pick < 0.2, -69.1)
    call["log_decay"] = decay.masked_fill(pick < 0.05, -torch.inf)
    state = torch.randn(1, HEADS, DIM, WIDTH, dtype=torch.float64)
    out, last = definition(call, state)
    for size in (16, 64):
        for x in (call["q"], call["k"], call["v"]):
            x.requires_grad_().grad = None
        found, found_last = ops.recurrence(**call, initial_state=state, chunk_size=size)
        assert near(found, out)
        assert near(found_last, last)
        (found.sum() + found_last.sum()).backward()
        assert all(call[name].grad.isfinite().all() for name in "qkv")
    assert LEAST < -100  # what a clamp leaves is nothing in float64


@pytest.mark.parametrize("update", UPDATES)
def test_gradients(update: str) -> None:
    call = terms(update, 21)
    names = [name for name in call if name != "low_rank"]
    pair = call.get("low_rank", ())
    given_ = [call[name].requires_grad_() for name in names] + [x.requires_grad_() for x in pair]
    state = torch.randn(1, HEADS, DIM, WIDTH, dtype=torch.float64, requires_grad=True)

    def outputs(*values: Tensor) -> tuple[Tensor, Tensor]:
        made = dict(zip(names, values, strict=False))
        if pair:
            made["low_rank"] = values[len(names) : -1]
        return ops.recurrence(**made, initial_state=values[-1], chunk_size=4, form="chunked")

    assert torch.autograd.gradcheck(outputs, (*given_, state), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("update", UPDATES)
def test_half_precision_is_computed_wide(update: str, dtype: torch.dtype) -> None:
    """No worse than twice what rounding the exact outputs loses, though sums leave float16's range."""
    call = terms(update, 300)
    call["v"] = call["v"] * 100
    half = {name: tuple(y.to(dtype) for y in x) if isinstance(x, tuple) else x.to(dtype)
            for name, x in call.items()}  # fmt: skip
    if update in ("plain", "head"):
        half["q"] = half["q"] / 64  # outputs stay in range, states do not
        half["v"] = half["v"] * 64
    exact = {name: tuple(y.double() for y in x) if isinstance(x, tuple) else x.double()
             for name, x in half.items()}  # fmt: skip
    out, last = ops.recurrence(**half)
    expected, _ = ops.recurrence(**exact)
    assert out.dtype == dtype
    assert last is not None
    assert last.dtype == torch.float32
    lost = (expected.to(dtype).double() - expected).abs().max()
    assert (out.double() - expected).abs().max() <= 2 * lost


def test_a_long_sequence_neither_overflows_nor_forgets() -> None:
    tokens = 65536
    k = torch.ones(1, 1, tokens, 1)
    v = torch.ones(1, 1, tokens, 1)
    out, last = ops.recurrence(k, k, v, normalize=True)
    assert near(out, torch.ones_like(out), 1e-6)
    assert last is not None
    assert float(last[0, 0, 0, 0]) == tokens


def test_an_empty_sequence_hands_its_state_on() -> None:
    call = terms("gated delta", 0)
    state = torch.randn(1, HEADS, DIM, WIDTH, dtype=torch.float64)
    out, last = ops.recurrence(**call, initial_state=state)
    assert out.shape == (1, HEADS, 0, WIDTH)
    assert last is not None
    assert torch.equal(last, state)


CALL = terms("plain", 6)
STATE = torch.zeros(1, HEADS, DIM, WIDTH)
BETA = torch.ones(1, HEADS, 6)
SHORT = {"k": CALL["k"][:, :, 1:], "v": CALL["v"][:, :, 1:]}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"log_decay": torch.full((HEADS,), 0.1)}, "log_decay must be at most 0, got 0.1"),
    ({"log_decay": torch.full((HEADS,), torch.nan)}, "log_decay must be at most 0"),
    ({"log_decay": torch.zeros(1, HEADS, 5)}, r"log_decay must be \[2\], \[1, 2, 6\] or"),
    ({"chunk_size": 48}, "chunk_size must be a power of two, got 48"),
    ({"chunk_size": 0}, "chunk_size must be a power of two, got 0"),
    ({"initial_state": STATE[:, 1:]}, r"initial_state must be \[1, 2, 8, 5\]"),
    ({"initial_state": STATE, "normalize": True}, r"\[1, 2, 8, 6\] \(sequences, heads, dim, v_dim \+ 1"),
    ({"cu_seqlens": torch.tensor([0, 4, 3, 6])}, "cu_seqlens must ascend from 0 to the 6 tokens"),
    ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens must ascend"),
    ({"cu_seqlens": torch.tensor([0])}, "cu_seqlens must ascend"),
    ({"beta": BETA[..., 0]}, r"beta must be \[1, 2, 6\]"),
    ({"beta": BETA, "low_rank": (CALL["k"], CALL["k"])}, "give beta or low_rank"),
    ({"low_rank": (CALL["v"], CALL["k"])}, "a of low_rank must be of q's shape"),
    ({"causal": False, "beta": BETA}, "causal=False takes the additive"),
    ({"causal": False, "initial_state": STATE}, "causal=False has no first token"),
    (SHORT, "k must be of q's shape"),
    ({"v": SHORT["v"]}, "v must begin as k"),
    ({"form": "fast"}, "form"),
    ({"form": "triton"}, "form='triton' cannot take this call: not on a CUDA device"),
    ({"form": "triton", "causal": False}, "without decays, causal=False is two plain products"),
]


@pytest.fixture
def as_users() -> Iterator[None]:
    """Without the checks of shapes that tests alone turn on, which would speak first."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_bad_input_is_named(as_users: None, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.recurrence(**{**CALL, **wrong})
