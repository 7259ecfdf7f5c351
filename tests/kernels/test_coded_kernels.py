"""The kernel of quantised segments, by Triton's interpreter where there is no GPU, against float64."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from interpreted import MARKS, answer, verdicts

from attlas.ops.decode import reference_decode
from attlas.ops.quantize import Codes, encode, pack
from attlas.ops.segments import Coded

pytestmark = MARKS

#: Inputs of each case of which the plain form's errors are taken.
DRAWS = 5
#: Tokens and channels that share a step; 0 channels are all.
TOKEN, CHANNEL, GROUPED = (1, 0), (32, 1), (1, 32)
#: What a case is when it says nothing else; `units` multiprocessors cut the slots into runs.
PLAIN: dict[str, Any] = {
    "k": (4, *TOKEN), "v": (4, *TOKEN), "dim": 64, "v_dim": 64, "batch": 1, "kv_heads": 2, "group": 2,
    "queries": 1, "slots": 150, "dtype": "float16", "channel": False, "lengths": None, "lists": None,
    "page": 16, "units": 2, "cut": (32, 2, 2, 1, 168), "view": False, "size": 1.0,
    "meta": "float16",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    **{
        f"{bits} bits, {name}": {"k": (bits, *shared), "v": (bits, *shared)}
        for bits, (name, shared) in product(
            (8, 4, 3, 2), {"per token": TOKEN, "per channel": CHANNEL, "grouped": GROUPED}.items()
        )
    },
    "keys per channel of 2 bits, values grouped": {"k": (2, 32, 1), "v": (2, 1, 16), "dim": 128},
    "one run": {"units": 1},
    "more units than blocks": {"units": 64, "cut": (16, 1, 2, 1, 168)},
    "one slot": {"slots": 1, "k": (4, *CHANNEL)},
    "whole blocks": {"slots": 256, "k": (2, *CHANNEL), "v": (2, *CHANNEL)},
    "large groups of tokens": {"k": (4, 128, 1), "v": (2, 64, 1), "slots": 300},
    "blocks of two groups of tokens": {"k": (4, 32, 1), "cut": (32, 2, 2, 1, 168), "group": 4},
    "blocks of four groups of tokens": {"k": (4, 16, 1), "v": (8, 16, 1), "group": 3},
    "8 groups of channels": {"k": (4, 1, 8), "v": (4, 1, 8), "group": 4, "queries": 2},
    "three groups of channels": {"dim": 48, "v_dim": 48, "k": (8, 1, 16), "v": (3, 1, 16)},
    "odd widths": {"dim": 96, "v_dim": 80, "k": (3, *TOKEN), "v": (4, *TOKEN)},
    "narrow": {"dim": 16, "v_dim": 16, "k": (2, *TOKEN), "v": (2, *CHANNEL)},
    "words of 16 bits": {"dim": 128, "v_dim": 128, "k": (2, *CHANNEL), "v": (4, *TOKEN)},
    "wide": {"dim": 256, "v_dim": 256, "k": (2, *TOKEN), "v": (2, *TOKEN), "slots": 70},
    "factors of channels": {"channel": True, "k": (4, *TOKEN), "v": (2, *GROUPED)},
    "factors and steps of channels": {"channel": True, "k": (3, *CHANNEL), "v": (4, *CHANNEL)},
    "three queries": {"queries": 3},
    "more rows than 16": {"queries": 5, "group": 4, "k": (4, *CHANNEL)},
    "copies of few rows": {"group": 1, "queries": 3, "v": (4, *GROUPED)},
    "16 rows without copies": {"cut": (32, 2, 2, 1, 168, 16), "k": (4, *CHANNEL)},
    "lengths": {"batch": 3, "lengths": "mixed", "k": (4, *CHANNEL)},
    "lengths of none": {"batch": 2, "lengths": "none"},
    "lengths and queries": {"batch": 2, "lengths": "mixed", "queries": 3, "v": (4, *CHANNEL)},
    "pages": {"lists": "keys", "k": (4, *CHANNEL), "v": (4, *GROUPED)},
    "pages as large as groups": {"lists": "keys", "page": 32, "k": (2, *CHANNEL)},
    "pages of query heads": {"lists": "queries", "batch": 2, "k": (4, *CHANNEL), "group": 3},
    "pages and lengths": {"lists": "keys", "lengths": "mixed", "batch": 2, "v": (2, *CHANNEL)},
    "odd pages": {"lists": "queries", "page": 5, "lengths": "mixed"},
    "tokens": {"lists": "keys", "page": 1, "queries": 2},
    "part of a longer cache": {"view": True, "batch": 2, "k": (3, *CHANNEL), "v": (2, *GROUPED)},
    "small keys": {"size": 1e-3, "k": (8, *CHANNEL)},
    "large keys": {"size": 50.0, "k": (8, *CHANNEL), "v": (8, *CHANNEL)},
    "steps in float32": {"meta": "float32", "k": (4, *CHANNEL), "v": (4, *GROUPED)},
    "steps in float32 of tokens": {"meta": "float32", "v": (2, *CHANNEL)},
    "float32": {"dtype": "float32", "k": (3, *CHANNEL), "v": (8, *GROUPED)},
    "float32, values per channel": {"dtype": "float32", "k": (4, *GROUPED), "v": (4, *CHANNEL)},
    "float32, words of 16 bits": {"dtype": "float32", "dim": 128, "k": (2, *TOKEN)},
    "steps in bfloat16": {
        "dtype": "bfloat16", "meta": "bfloat16", "k": (4, *CHANNEL), "v": (4, *GROUPED),
    },
    "bfloat16": {"dtype": "bfloat16", "k": (2, *CHANNEL), "v": (4, *GROUPED)},
    "bfloat16 of 8 bits": {"dtype": "bfloat16", "k": (8, *TOKEN), "v": (8, *TOKEN)},
}  # fmt: skip


def inputs(device: str, case: dict[str, Any], draw: int = 0) -> tuple[torch.Tensor, Coded]:
    torch.manual_seed(draw)
    pair, slots, dtype = (
        (case["batch"], case["kv_heads"]),
        case["slots"],
        getattr(torch, case["dtype"]),
    )
    q = torch.randn(case["batch"], pair[1] * case["group"], case["queries"], case["dim"]).to(
        device, dtype
    )
    k, v = (
        _codes(
            torch.randn(*pair, slots, case[width]) * case["size"] + centre, case, case[side], device
        )
        for side, width, centre in (("k", "dim", 1.0), ("v", "v_dim", -0.3))
    )
    lengths = {
        None: None,
        "mixed": torch.randint(0, slots + 1, pair),
        "none": torch.zeros(pair, dtype=torch.long),
    }[case["lengths"]]
    index = None
    if case["lists"]:
        heads = pair[1] * (case["group"] if case["lists"] == "queries" else 1)
        pages = -(-slots // case["page"])
        index = torch.rand(case["batch"], heads, pages).argsort(-1)[..., : max(1, pages * 2 // 3)]
        index = index.masked_fill(torch.rand(index.shape) > 0.8, -1).to(torch.int32)
    lengths, index = (None if t is None else t.to(device) for t in (lengths, index))
    return q, Coded(k, v, lengths, index, case["page"])


def _codes(x: torch.Tensor, case: dict[str, Any], how: tuple[int, int, int], device: str) -> Codes:
    bits, tokens, channels = how
    x = x.to(device, getattr(torch, case["dtype"]))
    channel = torch.rand(*x.shape[:2], 1, x.shape[-1]).to(device) + 0.5 if case["channel"] else None
    codes = encode(
        x,
        bits,
        token_group=tokens,
        channel_group=min(channels, x.shape[-1]) or None,
        channel=channel,
        meta=getattr(torch, case["meta"]),
    )
    if not case["view"]:
        return codes
    longer = {  # what stands behind must not be read
        name: torch.cat((t, torch.full_like(t, torch.nan if t.is_floating_point() else 255)), dim=2)
        for name, t in codes.tensors.items()
    }
    return codes.with_tensors({name: t[:, :, : t.shape[2] // 2] for name, t in longer.items()})


def errors(name: str, device: str = "cpu") -> tuple[float, float]:
    """Of the kernel against float64, and what is allowed: twice the plain form's, and an ulp."""
    from attlas.kernels.coded import Tiles, coded_attend, coded_runs

    case = {**PLAIN, **CASES[name]}
    q, segment = inputs(device, case)
    scale, cut = q.shape[-1] ** -0.5, Tiles(*case["cut"])
    each = coded_runs(q, segment, case["units"], cut)
    runs = (q.shape[0], each + 2, *q.shape[1:3])  # a run before and one behind, of others
    sums = torch.full((*runs, case["v_dim"]), torch.nan, device=device)
    lses = torch.full(runs, torch.nan, device=device)
    coded_attend(q, segment, scale, sums, lses, 1, each, cut)
    for others in (sums[:, 0], sums[:, -1], lses[:, 0], lses[:, -1]):
        assert others.isnan().all()
    exact = reference_decode(q.double(), [_double(segment)], scale)
    found = merged(sums[:, 1:-1], lses[:, 1:-1])
    worst = 0.0
    for ours, right, plain in zip(found, exact, plain_errors(device, case), strict=True):
        assert ours.shape == right.shape
        assert torch.equal(ours.isfinite(), right.isfinite())
        unit = torch.finfo(q.dtype).eps * right.nan_to_num(0, 0, 0).abs().max().item()
        worst = max(worst, off(ours, right) / max(2 * plain + unit, 1e-30))
    return worst, 1.0


def plain_errors(device: str, case: dict[str, Any]) -> list[float]:
    """Of outputs and sums: what plain operations are off by in the kernel's arithmetic.

    That is blocks of slots, merged, in the type of the inputs. A case may have a single sum, of which
    one draw is off by nothing as easily as by an ulp: the largest of several is what they are good for.
    """
    largest = [0.0, 0.0]
    for draw in range(DRAWS):
        q, segment = inputs(device, case, draw)
        scale = q.shape[-1] ** -0.5
        exact = reference_decode(q.double(), [_double(segment)], scale)
        with patch.multiple("attlas.ops.decode", AT_ONCE=1, SCORES=1):  # the smallest blocks
            plain = reference_decode(q, [segment], scale)
        largest = [max(e, off(*pair)) for e, *pair in zip(largest, plain, exact, strict=True)]
    return largest


def off(ours: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference, of what is finite."""
    ours, right = (x.double().nan_to_num(0, 0, 0) for x in (ours, right))
    return (ours - right).abs().max().item()


def merged(sums: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, natural log-sum-exp) of runs."""
    natural = lses.double() * torch.log(torch.tensor(2.0, dtype=torch.float64)).item()
    lse = natural.logsumexp(1)
    share = (natural - lse[:, None]).exp().nan_to_num(0.0)
    return (share[..., None] * sums.double()).sum(1), lse


def _double(segment: Coded) -> Coded:
    k, v = (replace(codes, dtype=torch.float64) for codes in (segment.k, segment.v))
    return replace(segment, k=k, v=v)


@pytest.fixture(scope="module")
def judged() -> Iterator[Callable[[str], Any]]:
    with verdicts(__file__, errors) as told:
        yield told


@pytest.mark.parametrize("name", CASES)
def test_coded_kernel_is_as_exact_as_the_plain_form(name: str, judged: Any) -> None:
    error, allowed = judged(name)
    assert error <= allowed


#: (keys, values) of (bits, width, tokens that share a step, groups of channels, words and steps to the
#: next), page and query rows.
BUILT: dict[str, tuple[Any, ...]] = {
    "4 bits per token": ((4, 128, 1, 1, 32, 1), (4, 128, 1, 1, 32, 1), 0, 4),
    "2 bits, keys per channel, values grouped": (
        (2, 128, 32, 128, 16, 128), (2, 128, 1, 4, 16, 4), 0, 4,
    ),
    "8 and 3 bits, pages, many rows": ((8, 128, 64, 128, 64, 128), (3, 128, 1, 1, 24, 1), 32, 32),
    "3 bits, and values per channel": ((3, 64, 1, 2, 12, 2), (4, 64, 32, 64, 16, 64), 0, 1),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", BUILT)
def test_coded_kernel_compiles_for_a_gpu_that_is_not_there(name: str, dtype: str) -> None:
    """The interpreter takes what the compiler refuses, and never sees the assembly."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from attlas.kernels.coded import TILES, constants
    from attlas.kernels.coded_run import over_a_run as kernel

    k, v, page, rows = BUILT[name]
    cut = TILES[k[0]]
    half = torch.bfloat16 if dtype == "bf16" else torch.float16
    fixed = constants(k, v, page, rows, half, cut)[0]
    fixed |= dict.fromkeys(("EVEN", "EVEN_STEPS", "ASSEMBLY"), True)
    fixed |= {"k_channel": None, "lengths": None} | ({} if page else {"index": None})
    types = {"q": dtype, "index": "i32"} | dict.fromkeys(("k", "k_more", "v", "v_more"), "i16")
    types |= dict.fromkeys(("sums", "lses"), "fp32")
    types |= {f"{side}_{what}": "fp16" for side, what in product("kv", ("step", "zero", "channel"))}
    names = kernel.arg_names
    taken = {
        n: "constexpr" if n in fixed else f"*{types[n]}" if n in types else "i32" for n in names
    } | {"factor": "fp32"}
    even = {(names.index(n),): [["tt.divisibility", 16]] for n in types if n not in fixed}
    made = compile(
        ASTSource(kernel, taken, {(names.index(n),): x for n, x in fixed.items()}, even),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": cut.warps, "num_stages": cut.stages, "maxnreg": cut.registers},
    )
    assert made.metadata.shared <= 99 * 1024
    assert "cp.async" in made.asm["ptx"]  # codes are on their way while others are in work
    assert "m16n8k16" in made.asm["ptx"]  # slots are the rows of products, queries 8 columns


def ptx(lines: str, given: list[int]) -> list[int]:
    """Registers $0, $1, … after so much of PTX as the assembly uses, with `given` behind them."""
    count = 1 + max(int(n) for n in re.findall(r"\$(\d+)", lines)) - len(given)
    held = {f"${count + n}": value for n, value in enumerate(given)}
    for line in re.sub(r"^\{.reg[^;]*;|\}$", "", lines).split(";")[:-1]:
        operation, into, *names = line.replace(",", " ").split()
        a, *more = (held[n] if n in held else int(n, 0) for n in names)
        if operation == "lop3.b32":
            assert more[2] == (0xF0 & 0xCC) | 0xAA
            found = (a & more[0]) | more[1]
        elif operation == "mov.b32":
            found = a
        else:
            act = {"and.b32": operator.and_, "shr.u32": operator.rshift, "shl.b32": operator.lshift}
            found = act[operation](a, *more)
        held[into] = found & 0xFFFFFFFF
    return [held[f"${n}"] for n in range(count)]


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_assembly_leaves_each_code_at_its_scale(bits: int) -> None:
    """Half a register times `scale` · 2²⁴, as float16, is the code that `pack` put there."""
    from attlas.kernels import bits as assembled

    each = assembled.each(bits)
    codes = torch.randint(0, 2**bits, (2, each), dtype=torch.uint8)  # of 2 words
    low = pack(codes & 3 if bits == 3 else codes, 2 if bits == 3 else bits)
    given = [int.from_bytes(bytes(low.flatten().tolist()), "little")]
    if bits == 3:  # a byte for each word; what is above it means nothing
        upper = ((codes.int() >> 2) << torch.arange(8)).sum(-1) | 0xA500
        given.append(int(upper[0] | upper[1] << 16))
    regs = torch.tensor(ptx(getattr(assembled, f"_{bits}").value, given)).view(each, -1)
    halves = torch.stack((regs & 0xFFFF, regs >> 16), dim=-1).flatten(1).to(torch.int16)
    at = torch.arange(each) * (16 // each) % 8
    numbers = halves.view(torch.float16).double() * 2.0**24 / 2.0 ** at[:, None]
    assert torch.equal(numbers, codes.T.double())


def test_coded_kernel_compiles_nothing_anew_for_another_length() -> None:
    from attlas.kernels.coded_run import over_a_run as kernel

    strides = {p.name for p in kernel.params if p.name[-2:] in ("_b", "_h", "_q")}
    assert {p.name for p in kernel.params if p.do_not_specialize} > strides
    assert len(strides) > 10


def _segment(bits: int = 4, width: int = 64, page: int | None = None, **how: Any) -> Coded:
    codes = encode(torch.randn(1, 1, 64, width), bits, **how)
    index = None if page is None else torch.zeros(1, 1, 1, dtype=torch.int32)
    return Coded(codes, codes, None, index, page or 1)


@pytest.mark.parametrize(
    ("segment", "reason"),
    [
        (_segment(), "not on a CUDA device"),
        (_segment(width=32), "32 wide, queries 64"),
    ],
)
def test_coded_kernel_says_why_it_refuses(segment: Coded, reason: str) -> None:
    from attlas.kernels.coded import coded_refuses

    assert reason in str(coded_refuses(torch.randn(1, 1, 1, 64), segment))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"bits": 1}, "1 bits"),
        ({"width": 24, "bits": 8}, "24 wide"),
        ({"channel_group": 2}, "32 groups of channels"),
        ({"token_group": 32}, "32 tokens by 64 channels"),
        ({"token_group": 24, "channel_group": 1}, "24 tokens share"),
        ({"token_group": 32, "channel_group": 1, "page": 8}, "pages of 8"),
        ({"token_group": 32, "channel_group": 1, "page": 64}, "pages of 64"),
    ],
)
def test_coded_kernel_refuses_formats_it_cannot_read(
    how: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attlas.kernels import coded

    monkeypatch.setattr(coded, "_on_device", lambda codes: True)
    segment = _segment(**how)
    assert reason in str(coded.coded_refuses(torch.randn(1, 1, 1, segment.k.dim), segment))
    assert coded.coded_refuses(torch.randn(1, 1, 1, 64), _segment()) is None


if __name__ == "__main__":
    answer(errors, CASES)
