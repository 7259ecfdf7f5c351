"""Codes: what is packed is unpacked, and what is read is within half a step of what was written."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attlas.errors import UserError
from attlas.ops.quantize import PLANES, Codes, encode, pack, unpack

ALL_BITS = sorted(PLANES)
#: Keywords of `encode`, for 32 channels.
GROUPS: dict[str, dict[str, Any]] = {
    "per token": {},
    "per channel": {"token_group": 16, "channel_group": 1},
    "groups of channels": {"channel_group": 8},
    "tokens by channels": {"token_group": 5, "channel_group": 16},
    "all tokens": {"token_group": 100},
}


def each_step(codes: Codes) -> torch.Tensor:
    """The step of every number, channel factors included."""
    step = codes.step.double().repeat_interleave(codes.channel_group, dim=-1)
    step = step.repeat_interleave(codes.token_group, dim=2)[:, :, : codes.tokens]
    return step if codes.channel is None else step * codes.channel.double()


def exactly(codes: Codes) -> torch.Tensor:
    return replace(codes, dtype=torch.float64).read()


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(ALL_BITS), st.integers(1, 6), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_what_is_packed_is_unpacked(bits: int, eights: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, rows, 8 * eights), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape[-1] == bits * eights
    assert torch.equal(unpack(packed, bits, 8 * eights), codes)


@pytest.mark.parametrize(
    ("bits", "packed"),
    [
        (8, [1, 3, 0, 7, 2, 6, 5, 4]),
        (4, [0x31, 0x70, 0x62, 0x45]),
        (2, [0b11_00_11_01, 0b00_01_10_10]),
        (3, [0b11_00_11_01, 0b00_01_10_10, 0b11101000]),
        (1, [0b01001011]),
    ],
)
def test_bytes_hold_neighbouring_channels_low_bits_first(bits: int, packed: list[int]) -> None:
    codes = torch.tensor([1, 3, 0, 7, 2, 6, 5, 4], dtype=torch.uint8)
    assert pack(codes & (2**bits - 1), bits).tolist() == packed


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(ALL_BITS), st.sampled_from(sorted(GROUPS)), st.integers(1, 40),
    st.sampled_from([1e-4, 1.0, 300.0]), st.sampled_from([0.0, 1.0, -100.0]), st.booleans(),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_what_is_read_is_within_half_a_step(
    bits: int, how: str, tokens: int, size: float, centre: float, divided: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, tokens, 32, generator=generator) * size + centre
    channel = torch.rand(2, 3, 1, 32, generator=generator) + 0.5 if divided else None
    codes = encode(x, bits, channel=channel, **GROUPS[how])
    step = each_step(codes)
    rounding = 4 * torch.finfo(torch.float32).eps * x.abs().amax()  # of what was coded, in float32
    assert ((exactly(codes) - x.double()).abs() <= step / 2 + rounding).all()
    assert codes.read().shape == x.shape
    assert codes.read().dtype == x.dtype


@pytest.mark.parametrize("how", GROUPS)
def test_steps_are_those_of_their_group(how: str) -> None:
    x = torch.randn(1, 2, 23, 32)
    codes = encode(x, 4, meta=torch.float32, **GROUPS[how])
    tokens, channels = codes.token_group, codes.channel_group
    assert codes.step.shape == (1, 2, -(-23 // tokens), 32 // channels)
    for group in range(codes.step.shape[2]):
        for part in range(codes.step.shape[3]):
            block = x[
                :, :, group * tokens : (group + 1) * tokens, part * channels : (part + 1) * channels
            ]
            low, high = block.amin((2, 3)), block.amax((2, 3))
            torch.testing.assert_close(codes.zero[:, :, group, part], low)
            torch.testing.assert_close(codes.step[:, :, group, part], (high - low) / 15)


def test_a_partial_last_group_is_coded_by_its_own_numbers() -> None:
    x = torch.cat((torch.randn(1, 1, 16, 32) * 100, torch.rand(1, 1, 3, 32)), dim=2)
    whole = encode(x, 4, token_group=16, channel_group=1)
    alone = encode(x[:, :, 16:], 4, token_group=16, channel_group=1)
    assert torch.equal(whole.read(16), alone.read())


@pytest.mark.parametrize("how", GROUPS)
@pytest.mark.parametrize("divided", [False, True])
def test_parts_that_are_read_are_parts_of_the_whole(how: str, divided: bool) -> None:
    x = torch.randn(2, 2, 37, 32)
    codes = encode(x, 3, channel=torch.rand(2, 2, 1, 32) + 0.5 if divided else None, **GROUPS[how])
    whole = codes.read()
    assert torch.equal(codes.read(5, 21), whole[:, :, 5:21])
    assert torch.equal(codes.read(30, 99), whole[:, :, 30:])
    assert codes.read(37).shape == (2, 2, 0, 32)
    slots = torch.randint(0, 37, (2, 2, 9))
    assert torch.equal(
        codes.gather(slots), whole.gather(2, slots[..., None].expand(-1, -1, -1, 32))
    )
    slots = torch.randint(0, 37, (2, 6, 9))  # of query heads, three to a key head
    repeated = whole.repeat_interleave(3, dim=1).gather(2, slots[..., None].expand(-1, -1, -1, 32))
    assert torch.equal(codes.gather(slots), repeated)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.3, 1234.5])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_equal_numbers_come_back(bits: int, value: float) -> None:
    codes = encode(torch.full((1, 1, 4, 16), value), bits)
    assert (exactly(codes) - value).abs().max() <= torch.finfo(torch.float16).eps * abs(
        value
    ) / 2**bits
    exact = encode(torch.full((1, 1, 4, 16), value), bits, meta=torch.float32)
    assert torch.equal(exact.read(), torch.full((1, 1, 4, 16), value))


def test_numbers_far_from_zero_keep_their_differences() -> None:
    """A zero that float16 rounds up would leave all numbers below it with one code."""
    x = 1000.4 + torch.rand(1, 1, 8, 32) / 10
    codes = encode(x, 8)
    assert (exactly(codes) - x).abs().max() < 0.6 / 255


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_read_in_the_type_in_which_they_came(dtype: torch.dtype) -> None:
    codes = encode(torch.randn(1, 2, 9, 32).to(dtype), 8)
    assert codes.read().dtype == codes.gather(torch.zeros(1, 2, 1, dtype=torch.long)).dtype == dtype
    assert torch.equal(codes.read(), exactly(codes).to(torch.float32).to(dtype))


def test_bytes_are_counted() -> None:
    x = torch.randn(2, 3, 50, 32)
    grouped = encode(x, 2, channel_group=8)
    assert grouped.nbytes == 6 * 50 * (32 * 2 // 8 + 2 * 4 * 2)
    factors = torch.ones(2, 3, 1, 32)
    channels = encode(x, 3, token_group=32, channel_group=1, channel=factors)
    assert channels.nbytes == 6 * (50 * 12 + 2 * 2 * 32 * 2 + 32 * 4)
    assert set(channels.tensors) == {"data", "step", "zero", "channel"}


def test_tensors_can_be_replaced() -> None:
    codes = encode(torch.randn(3, 2, 20, 32), 4, token_group=8, channel_group=1)
    order = torch.tensor([2, 0, 0])
    moved = codes.with_tensors({name: t[order] for name, t in codes.tensors.items()})
    assert torch.equal(moved.read(), codes.read()[order])
    assert (moved.bits, moved.token_group, moved.dtype) == (4, 8, torch.float32)


def test_no_tokens_are_no_codes() -> None:
    codes = encode(torch.randn(2, 2, 0, 32), 4, token_group=8, channel_group=1)
    assert codes.tokens == 0
    assert codes.read().shape == (2, 2, 0, 32)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"bits": 5}, r"bits takes one of \[1, 2, 3, 4, 8\], got 5"),
        ({"bits": 4, "token_group": 0}, "token_group must be at least 1, got 0"),
        ({"bits": 4, "channel_group": 5}, "channel_group must divide the 12 channels, got 5"),
        ({"bits": 4, "channel_group": 0}, "channel_group must divide the 12 channels, got 0"),
        ({"bits": 3}, "3 bits need a multiple of 8 channels, got 12"),
    ],
)
def test_what_cannot_be_coded_is_said(how: dict[str, Any], message: str) -> None:
    x = torch.randn(1, 1, 4, 12)
    with pytest.raises(UserError, match=message):
        encode(x, **how)
