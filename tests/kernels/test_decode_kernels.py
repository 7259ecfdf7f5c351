"""The decoding kernels, run by Triton's interpreter where there is no GPU, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from interpreted import MARKS, answer, verdicts
from plain import plain
from torch import Tensor
from torch.nn.functional import pad

from attlas.cache.summaries import Portion, best_portion
from attlas.ops.decode import decode
from attlas.ops.decode_kernels import choose_pages, choose_portion, launch, refuses, score_pages
from attlas.ops.pages import page_bounds, reference_best_pages, reference_page_scores
from attlas.ops.quantize import encode
from attlas.ops.segments import Coded, Dense, Listed, Ragged

pytestmark = MARKS

#: Inputs of each case of which the plain form's errors are taken.
DRAWS = 5
#: What a case is when it says nothing else; `units` multiprocessors cut the slots into runs.
PLAIN: dict[str, Any] = {
    "kinds": ("dense",), "batch": 2, "heads": 4, "kv_heads": 2, "queries": 1, "slots": 150,
    "dim": 32, "v_dim": 32, "dtype": "float32", "lengths": None, "visible": None, "causal": False,
    "bias": False, "page": 1, "per_query_head": False, "view": False, "units": 8, "size": 1.0,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "one run": {"units": 1},
    "more units than blocks": {"units": 512},
    "one slot": {"slots": 1},
    "whole blocks": {"slots": 256},
    "one head for each key head": {"heads": 3, "kv_heads": 3},
    "a group of twenty": {"heads": 20, "kv_heads": 1},
    "values narrower than keys": {"dim": 64, "v_dim": 16},
    "widths of no power of two": {"dim": 80, "v_dim": 96},
    "wide": {"dim": 256, "v_dim": 256, "slots": 70, "batch": 1},
    "queries": {"queries": 5},
    "causal": {"queries": 5, "causal": True},
    "causal, fewer slots than queries": {"queries": 5, "slots": 3, "causal": True},
    "sixty-four rows": {"heads": 8, "kv_heads": 1, "queries": 8, "causal": True},
    "lengths": {"lengths": "mixed", "units": 16},
    "lengths and causal": {"lengths": "mixed", "queries": 3, "causal": True},
    "no length at all": {"lengths": "none"},
    "visible to all heads": {"visible": 1, "queries": 2},
    "visible by key head": {"visible": 2, "queries": 2, "lengths": "mixed"},
    "visible by query head": {"visible": 4, "queries": 2, "causal": True},
    "rows that see nothing": {"visible": "blind", "queries": 2},
    "bias": {"bias": True, "queries": 2, "lengths": "mixed"},
    "views": {"view": True, "bias": True},
    "extreme scores": {"size": 100.0},
    "float16": {"dtype": "float16", "slots": 300, "queries": 2, "causal": True},
    "bfloat16": {"dtype": "bfloat16", "slots": 300},
    "ragged": {"kinds": ("ragged",), "slots": 200, "units": 4},
    "ragged, one run": {"kinds": ("ragged",), "units": 1, "batch": 1},
    "ragged with bias": {"kinds": ("ragged",), "bias": True, "queries": 3},
    "ragged float16": {"kinds": ("ragged",), "dtype": "float16"},
    "tokens listed": {"kinds": ("listed",), "slots": 300},
    "tokens listed by query head": {"kinds": ("listed",), "per_query_head": True, "queries": 2},
    "pages": {"kinds": ("listed",), "page": 16, "slots": 410, "lengths": "mixed"},
    "pages of five": {"kinds": ("listed",), "page": 5, "slots": 203, "view": True},
    "pages by query head": {"kinds": ("listed",), "page": 8, "per_query_head": True},
    "pages larger than a block": {"kinds": ("listed",), "page": 100, "slots": 450, "batch": 1},
    "all kinds": {"kinds": ("ragged", "listed", "dense"), "page": 4, "queries": 2, "causal": True},
    "codes beside dense": {"kinds": ("coded", "dense"), "slots": 64},
    "two dense, one of them hidden": {"kinds": ("dense", "hidden")},
}  # fmt: skip
#: Rows of scores of pages, and how many are chosen.
CHOICES: dict[str, tuple[Any, int]] = {
    "random": (lambda: torch.randn(2, 3, 100), 17),
    "ties": (lambda: torch.randint(-3, 4, (2, 2, 70)).float(), 20),
    "all equal": (lambda: torch.zeros(1, 2, 33), 8),
    "both zeros": (lambda: torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0, -1.0]).expand(1, 1, 6), 3),
    "some unseen": (lambda: torch.randn(1, 3, 50).masked_fill(torch.rand(50) > 0.5, -torch.inf), 20),
    "most unseen": (lambda: torch.randn(1, 3, 50).masked_fill(torch.rand(50) > 0.1, -torch.inf), 20),
    "none seen": (lambda: torch.full((1, 1, 9), -torch.inf), 4),
    "infinite": (lambda: torch.randn(1, 1, 9).masked_fill(torch.rand(9) > 0.5, torch.inf), 4),
    "no number": (lambda: torch.randn(1, 2, 30).masked_fill(torch.rand(30) > 0.8, torch.nan), 9),
    "zeros of both signs": (lambda: (torch.rand(1, 2, 40) > 0.5) * -1.0 * torch.zeros(40), 7),
    "all": (lambda: torch.randn(1, 2, 21), 21),
    "one": (lambda: torch.randn(2, 2, 64), 1),
    "none": (lambda: torch.randn(2, 2, 64), 0),
    "one page": (lambda: torch.randn(1, 1, 1), 1),
    "negative": (lambda: -torch.rand(1, 2, 300) - 1, 40),
    "many": (lambda: torch.randn(1, 2, 5000) * 40, 600),
}  # fmt: skip
#: (batch, heads, key heads, keys, width, page, shared) of summaries that are scored.
SCORES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "shared": (2, 8, 2, 300, 32, 16, True),
    "by head": (2, 8, 2, 300, 32, 16, False),
    "one page": (1, 4, 4, 7, 64, 16, True),
    "odd width": (1, 6, 2, 1000, 80, 4, True),
}
#: (batch, heads, slots, width of keys, of values, slot) of a token that is written.
PLACES: dict[str, tuple[int, int, int, int, int, int]] = {
    "first": (1, 2, 5, 16, 16, 0),
    "last, odd widths": (3, 2, 7, 40, 24, 6),
    "no room": (2, 2, 4, 16, 16, 4),
}


def inputs(device: str, case: dict[str, Any], draw: int = 0) -> tuple[Tensor, list[Any], list[Any]]:
    """(q, segments, the same with NaN wherever nothing may be read)."""
    torch.manual_seed(draw)
    shape = (case["batch"], case["heads"], case["queries"], case["dim"])
    dtype = getattr(torch, case["dtype"])
    q = (torch.randn(shape) * case["size"]).to(device, dtype)
    made = [_segment(case, kind, device, dtype) for kind in case["kinds"]]
    return q, [s for s, _ in made], [s for _, s in made]


def _segment(case: dict[str, Any], kind: str, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    batch, kv_heads, slots = case["batch"], case["kv_heads"], case["slots"]
    pair = batch, kv_heads
    if kind == "ragged":
        counts = torch.randint(0, slots + 1, pair)
        counts.view(-1)[0] = slots
        starts = torch.zeros(counts.numel(), dtype=torch.long)
        order = torch.randperm(counts.numel())
        starts[order] = (counts.view(-1)[order] + 3).cumsum(0) - counts.view(-1)[order]
        total = int(counts.sum()) + 3 * counts.numel()
        k, v = torch.randn(total, case["dim"]), torch.randn(total, case["v_dim"])
        bias = torch.randn(total) if case["bias"] else None
        valid = torch.zeros(total, dtype=torch.bool)
        for start, count in zip(starts.tolist(), counts.view(-1).tolist(), strict=True):
            valid[start : start + count] = True
        segment: Any = Ragged(k, v, starts.view(pair), counts, slots, bias)
    else:
        k, v = (torch.randn(*pair, slots, case[n]) for n in ("dim", "v_dim"))
        bias = torch.randn(*pair, slots) if case["bias"] else None
        lengths = {
            None: None,
            "mixed": torch.randint(0, slots + 1, pair),
            "none": torch.zeros(pair, dtype=torch.long),
        }[case["lengths"]]
        valid = torch.ones(*pair, slots, dtype=torch.bool)
        if lengths is not None:
            valid &= torch.arange(slots) < lengths[..., None]
        if kind == "coded":
            of_k, of_v = (encode(x.to(device, dtype), 4) for x in (k, v))
            segment = Coded(of_k, of_v, None if lengths is None else lengths.to(device))
            return segment, segment
        if kind == "listed":
            pages = -(-slots // case["page"])
            lists = case["heads"] if case["per_query_head"] else kv_heads
            index = torch.rand(batch, lists, pages).argsort(-1)[..., : max(1, pages * 2 // 3)]
            index = index.masked_fill(torch.rand(index.shape) > 0.8, -1).to(torch.int32)
            segment = Listed(k, v, index, case["page"], lengths)
        elif kind == "hidden":
            segment = Dense(k, v, torch.zeros(pair, dtype=torch.long))
        else:
            seen = None
            if case["visible"] is not None:
                blind = case["visible"] == "blind"
                heads = 1 if blind else case["visible"]
                seen = torch.rand(batch, heads, case["queries"], slots) > 0.5
                if blind:
                    seen[:, :, 0] = False
            segment = Dense(k, v, lengths, seen, case["causal"], bias)
    return _moved(segment, valid, case["view"], device, dtype)


def _moved(
    segment: Any, valid: Tensor, view: bool, device: str, dtype: torch.dtype
) -> tuple[Any, Any]:
    """The segment on the device, as its reference reads it and as the kernel is given it."""

    def held(x: Tensor) -> Tensor:
        x = x.to(device, dtype)
        if view:  # slots between those of another cache
            x = torch.stack((x, x.new_full(x.shape, torch.nan)), dim=3)[:, :, :, 0]
        return x

    other = {
        name: t.to(device)
        for name, t in vars(segment).items()
        if isinstance(t, Tensor) and name not in "kv"
    }
    if view and "bias" in other:
        other["bias"] = torch.stack((other["bias"], other["bias"]), dim=-1)[..., 0]
    clean = replace(segment, k=held(segment.k), v=held(segment.v), **other)
    k, v = (x.masked_fill(~valid[..., None], torch.nan) for x in (segment.k, segment.v))
    return clean, replace(segment, k=held(k), v=held(v), **other)


def judge(name: str, device: str = "cpu") -> tuple[float, float]:
    """Of the kernels against float64, and what is allowed: twice the plain form's, and an ulp."""
    case = {**PLAIN, **CASES[name]}
    if device == "cuda" and case["dtype"] == "float32":  # refused there
        case["dtype"] = "float16"
    q, segments, poisoned = inputs(device, case)
    exact = decode(q.double(), [_double(s) for s in segments], scale=0.2, route="reference")
    found = launch(q, poisoned, 0.2, units=case["units"])
    assert found[0].dtype == q.dtype
    assert found[1].dtype == torch.float32
    worst = 0.0
    for ours, right, theirs in zip(found, exact, plain_errors(device, case), strict=True):
        assert ours.shape == right.shape
        assert torch.equal(ours.isfinite(), right.isfinite())
        unit = torch.finfo(q.dtype).eps * right.nan_to_num(0, 0, 0).abs().max().item()
        worst = max(worst, off(ours, right) / max(2 * theirs + unit, 1e-30))
    return worst, 1.0


def plain_errors(device: str, case: dict[str, Any]) -> list[float]:
    """Of outputs and sums: what plain operations are off by in the kernels' arithmetic.

    A case may have a single sum, of which one draw is off by nothing as easily as by an ulp: the
    largest of several draws is what plain operations are good for.
    """
    largest = [0.0, 0.0]
    for draw in range(DRAWS):
        q, segments, _ = inputs(device, case, draw)
        exact = decode(q.double(), [_double(s) for s in segments], scale=0.2, route="reference")
        found = plain(q, segments, 0.2, case["units"])
        largest = [max(e, off(*pair)) for e, *pair in zip(largest, found, exact, strict=True)]
    return largest


def off(ours: Tensor, right: Tensor) -> float:
    """Largest difference, of what is finite."""
    ours, right = (x.double().nan_to_num(0, 0, 0) for x in (ours, right))
    return (ours - right).abs().max().item()


def _double(segment: Any) -> Any:
    if isinstance(segment, Coded):
        k, v = (replace(codes, dtype=torch.float64) for codes in (segment.k, segment.v))
        return replace(segment, k=k, v=v)
    bias = getattr(segment, "bias", None)
    more = {} if bias is None else {"bias": bias.double()}
    return replace(segment, k=segment.k.double(), v=segment.v.double(), **more)


def judge_choice(name: str, device: str = "cpu") -> tuple[float, float]:
    torch.manual_seed(0)
    scores, count = CHOICES[name][0]().to(device), CHOICES[name][1]
    found, right = choose_pages(scores, count), reference_best_pages(scores, count)
    assert found.dtype == right.dtype
    assert found.shape == right.shape
    batch, _, pages = scores.shape
    # As `page_scores` gives them.
    roomy = pad(scores, (0, -pages % 16), value=torch.nan)[..., :pages]
    wrong = int((found != right).sum() + (choose_pages(roomy, count) != right).sum())
    if not count:
        return float(wrong), 0.0
    # Of a number of pages that the device knows alone, as many as a portion asks for; the sort takes
    # what lies behind them for −∞.
    finite = scores.cpu().clamp(min=torch.finfo(torch.float32).min)
    for portion in (Portion(pages=count), Portion(0.3), Portion(0.7, newest=2)):
        lengths = torch.randint(0, 3 * pages + 1, (batch, 1, 2), dtype=torch.int32)[..., 0]
        told = lengths.to(device), 3, portion.keep, portion.newest
        some = choose_portion(roomy, portion.of(pages), *told).cpu()
        least = best_portion(finite, portion, lengths, 3)
        seen = scores.cpu().gather(-1, least.clamp(min=0).long()) > -torch.inf
        wrong += int((some != torch.where(seen, least, -1)).sum())
    return float(wrong), 0.0


def judge_scores(name: str, device: str = "cpu") -> tuple[float, float]:
    torch.manual_seed(0)
    batch, heads, kv_heads, keys, dim, page, shared = SCORES[name]
    q = torch.randn(batch, heads, 1, dim)
    low, high = page_bounds(torch.randn(batch, kv_heads, keys, dim), page)
    q, low, high = (t.to(device, torch.float16) for t in (q, low, high))
    found = score_pages(q, low, high, shared=shared)
    right = reference_page_scores(q.double(), low.double(), high.double(), shared=shared)
    assert found.dtype == torch.float32
    assert found.shape == right.shape
    return (found - right).abs().max().item(), 1e-5 * right.abs().max().item()


def judge_placing(name: str, device: str = "cpu") -> tuple[float, float]:
    torch.manual_seed(0)
    batch, heads, slots, dim, v_dim, at = PLACES[name]
    rooms = [torch.randn(batch, heads, slots, width, device=device) for width in (dim, v_dim)]
    # As a projection gives them: heads side by side.
    token = [torch.randn(batch, 1, heads, w, device=device).transpose(1, 2) for w in (dim, v_dim)]
    right = [room.clone() for room in rooms]
    if 0 <= at < slots:
        for room, one in zip(right, token, strict=True):
            room[:, :, at : at + 1] = one
    from attlas.kernels.placing import place

    place(*rooms, torch.tensor([at], device=device), *token)
    return float(sum((a != b).sum() for a, b in zip(rooms, right, strict=True))), 0.0


JUDGES: dict[str, tuple[dict[str, Any], Any]] = {
    "decode": (CASES, judge),
    "choice": (CHOICES, judge_choice),
    "scores": (SCORES, judge_scores),
    "placing": (PLACES, judge_placing),
}
ALL = [f"{kind}: {name}" for kind, (cases, _) in JUDGES.items() for name in cases]


def errors(name: str, device: str = "cpu") -> tuple[float, float]:
    kind, case = name.split(": ", 1)
    return JUDGES[kind][1](case, device)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def judged() -> Iterator[Callable[[str], Any]]:
    with verdicts(__file__, errors) as told:
        yield told


@pytest.mark.parametrize("name", ALL)
def test_kernels_agree_with_the_reference(name: str, judged: Any) -> None:
    error, allowed = judged(name)
    assert error <= allowed


def compiled(
    kernel: Any, fixed: dict[str, Any], absent: set[str], dtype: str, **options: int
) -> Any:
    """The kernel for a GPU that is not there; arguments that are `absent` are None.

    What may be specialised is a multiple of sixteen, as addresses and strides mostly are.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    pointers = dict.fromkeys(("q", "k", "v", "low", "high"), f"*{dtype}")
    pointers |= dict.fromkeys(("sums", "lses", "lse", "bias", "scores"), "*fp32")
    pointers |= {"keys": f"*{dtype}", "values": f"*{dtype}", "slot": "*i64", "lengths": "*i64"}
    pointers |= {"offsets": "*i64", "index": "*i32", "visible": "*u8"}
    pointers |= {"factor": "fp32", "out": {"_choice": "*i32", "_bounds": "*fp32"}.get(
        kernel.__name__, f"*{dtype}")}  # fmt: skip
    fixed = {**fixed, **dict.fromkeys(absent)}
    names = kernel.arg_names
    taken = {n: "constexpr" if n in fixed else pointers.get(n, "i32") for n in names}
    varying = {n for n, p in zip(names, kernel.params, strict=True) if p.do_not_specialize}
    whole = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in {*fixed, *varying}
    }
    held = {(names.index(n),): fixed[n] for n in names if n in fixed}
    source = ASTSource(kernel, taken, held, whole)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options)


#: Arguments that each kind of segment is called with, of those that may be absent.
GIVEN = {
    "dense": set(),
    "dense, with all there is": {"lengths", "visible", "bias"},
    "ragged": {"lengths", "offsets", "bias"},
    "listed": {"lengths", "index"},
}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", GIVEN)
def test_attending_compiles_for_a_gpu_that_is_not_there(kind: str, dtype: str) -> None:
    """The interpreter takes what the compiler refuses: names that change their type in a loop."""
    from attlas.kernels import decode as kernels

    shared = 227 * 1024
    segments = {"ragged": Ragged, "listed": Listed}
    cut = kernels.TILES[segments.get(kind, Dense)]
    keys = cut.keys if dtype == "bf16" else 16
    fixed = {
        "DIM": 128, "DIM_ROOM": 128, "V_DIM": 80, "V_ROOM": 128, "ROWS": 16, "KEYS": keys,
        "PAGE": 16 if kind == "listed" else 0, "CAUSAL": "visible" in GIVEN[kind],
    }  # fmt: skip
    absent = {"lengths", "offsets", "index", "visible", "bias"} - GIVEN[kind]
    made = compiled(
        kernels._over_a_run, fixed, absent, dtype, num_warps=cut.warps, num_stages=cut.stages
    )
    assert made.metadata.shared <= shared
    if kind in ("dense", "listed") and dtype == "bf16":
        # As many programs share a unit as are meant to, and keys are on their way while others are used.
        assert cut.programs * made.metadata.shared <= shared
        assert made.metadata.shared > (cut.stages - 1) * keys * 256 * 2


def test_other_kernels_compile_for_a_gpu_that_is_not_there() -> None:
    from attlas.kernels import decode, pages, placing

    fixed = {"V_DIM": 80, "COLUMNS": 32, "AT_ONCE": 128, "ALL": 256}
    compiled(decode._over_runs, fixed, set(), "bf16", num_warps=4)
    for shared in (True, False):
        fixed = {"DIM": 128, "DIM_ROOM": 128, "ROWS": 16, "PAGES": pages.PAGES, "SHARED": shared}
        made = compiled(pages._bounds, fixed, set(), "bf16", num_warps=4, num_stages=pages.STAGES)
        assert (pages.PROGRAMS if shared else 1) * made.metadata.shared <= 227 * 1024
        assert "cp.async.cg.shared.global" in made.asm["ptx"]  # sixteen bytes at a time, and ahead
    block, stages = pages.tiles(256, 64, 99 * 1024)
    fixed = {"DIM": 256, "DIM_ROOM": 256, "ROWS": 64, "PAGES": block, "SHARED": False}
    made = compiled(pages._bounds, fixed, set(), "bf16", num_warps=4, num_stages=stages)
    assert made.metadata.shared <= 99 * 1024
    fixed = {"BLOCK": 1024, "FOURS": True, "KEEP": 0.125, "NEWEST": 0}
    made = compiled(pages._choice, fixed, set(), "bf16", num_warps=4)
    assert "ld.global.v4" in made.asm["ptx"]
    compiled(pages._choice, {**fixed, "KEEP": 0.0}, {"lengths"}, "bf16", num_warps=4)
    fixed = {"DIM": 128, "DIM_ROOM": 128, "V_DIM": 80, "V_ROOM": 128}
    compiled(placing._place, fixed, set(), "bf16", num_warps=1)


@pytest.mark.parametrize(
    ("kib", "dim", "v_dim", "heads"),
    [(99, 128, 128, 4), (99, 192, 128, 32), (227, 256, 256, 64), (227, 64, 64, 64)],
)
def test_tiles_leave_room_in_every_devices_shared_memory(
    kib: int, dim: int, v_dim: int, heads: int, monkeypatch: Any
) -> None:
    from attlas.kernels import decode as kernels

    monkeypatch.setattr(kernels, "_device", lambda _: (132, kib * 1024))
    q, k, v = (
        torch.empty(1, h, 1, width, dtype=torch.bfloat16)
        for h, width in ((heads, dim), (1, dim), (1, v_dim))
    )
    cut = kernels.tiles(q, Dense(k, v))
    assert cut.stages > 1
    fixed = {
        "DIM": dim, "DIM_ROOM": kernels.room(dim), "V_DIM": v_dim, "V_ROOM": kernels.room(v_dim),
        "ROWS": kernels.room(heads), "KEYS": cut.keys, "PAGE": 0, "CAUSAL": False,
    }  # fmt: skip
    absent = {"lengths", "offsets", "index", "visible", "bias"}
    made = compiled(
        kernels._over_a_run, fixed, absent, "bf16", num_warps=cut.warps, num_stages=cut.stages
    )
    assert made.metadata.shared <= kib * 1024


def test_runs_fill_the_units_and_are_no_shorter_than_a_block() -> None:
    from attlas.kernels import decode as kernels

    q = torch.empty(1, 32, 1, 128, dtype=torch.bfloat16)
    for slots in (1, 64, 65, 8192, 131072):
        k = torch.empty(1, 8, slots, 128, device="meta")
        cut = kernels.tiles(q, Dense(k, k))
        blocks = -(-slots // cut.keys)
        assert kernels.runs(q, Dense(k, k), 132) == min(132 * cut.programs // 8, blocks)


def test_kernels_are_not_for_the_host() -> None:
    q, segments, _ = inputs("cpu", PLAIN)
    assert refuses(q, segments) == "not on a CUDA device"
    with pytest.raises(ValueError, match="CUDA"):
        decode(q, segments, route="triton")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnADevice:
    def given(self, **more: Any) -> tuple[Tensor, list[Any]]:
        return inputs("cuda", {**PLAIN, "dtype": "bfloat16", "slots": 1000, **more})[:2]

    def test_a_step_is_captured_with_lengths_that_grow_afterwards(self) -> None:
        q, (dense,) = self.given()
        lengths = torch.full(dense.k.shape[:2], 10, device="cuda")
        grown = replace(dense, lengths=lengths)
        decode(q, [grown], route="triton")  # compiled before it is captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = decode(q, [grown], route="triton")
        lengths.fill_(777)
        graph.replay()
        right = decode(q, [Dense(dense.k[:, :, :777], dense.v[:, :, :777])], route="reference")
        torch.testing.assert_close(out, right[0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse, right[1].float(), rtol=2e-2, atol=2e-2)

    def test_nothing_is_compiled_anew_for_another_length(self) -> None:
        from attlas.kernels.decode import _over_a_run

        def made() -> int:
            return sum(len(caches[0]) for caches in _over_a_run.device_caches.values())

        q, (dense,) = self.given(slots=1024)
        decode(q, [dense], route="triton")
        before = made()
        for slots in (1023, 1000, 777, 16):
            decode(q, [Dense(dense.k[:, :, :slots], dense.v[:, :, :slots])], route="triton")
        assert made() == before

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"dtype": "float32"}, "16 bits"),
            ({"dim": 512}, "wide"),
            ({"heads": 64, "kv_heads": 1, "queries": 2}, "rows"),
        ],
    )  # fmt: skip
    def test_what_the_kernels_do_not_take_is_refused(self, change: Any, reason: str) -> None:
        q, segments = self.given(**change)
        assert reason in (refuses(q, segments) or "")
        decode(q, segments)  # and goes another way

    def test_calls_that_want_gradients_are_refused(self) -> None:
        q, (dense,) = self.given()
        dense.k.requires_grad_()
        assert "gradients" in (refuses(q, [dense]) or "")
        with torch.no_grad():
            assert refuses(q, [dense]) is None


if __name__ == "__main__":
    none = {f"decode: {name}" for name, case in CASES.items() if case.get("dtype") == "bfloat16"}
    answer(errors, set(ALL) - none)
