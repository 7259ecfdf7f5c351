"""When the decoding kernels may be taken, and how they are called.

Kernels of segments fill runs of one pair of buffers, sums [batch, runs, heads, queries, v_dim] and
lses [batch, runs, heads, queries], both float32; one more kernel merges all runs into the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from attlas.ops.segments import Coded, Dense, Listed, Ragged, Segment

#: Query rows that share keys, width of a key or value, and pages of a row that the kernels take.
ROWS, WIDTH, PAGES = 64, 256, 16384
HALVES = (torch.bfloat16, torch.float16)
#: Segments of numbers, which one kernel takes.
HELD = (Dense, Ragged, Listed)


def refuses(q: Tensor, segments: Sequence[Segment]) -> str | None:
    """Why the kernels cannot take a call of `decode`, None when they can."""
    reason = _refuses(q)
    for segment in segments:
        if reason is not None:
            return reason
        if isinstance(segment, Coded):
            from attlas.kernels.coded import coded_refuses

            reason = coded_refuses(q, segment)
        elif isinstance(segment, HELD):
            reason = _segment_refused(q, segment)
        else:
            reason = f"no kernel reads {type(segment).__name__}"
    return reason


def launch(
    q: Tensor, segments: Sequence[Segment], scale: float, *, units: int | None = None
) -> tuple[Tensor, Tensor]:
    """`decode` by kernels; `units` multiprocessors are filled, the device's unless given."""
    from attlas.kernels import decode as kernels

    q = q if q.stride(-1) == 1 else q.contiguous()
    units = kernels.units(q.device) if units is None else units
    cuts, total = [], 0
    for segment in segments:
        count = _runs(q, segment, units)
        cuts.append((segment, total, count))
        total += count
    batch, heads, queries, _ = q.shape
    sums = q.new_empty((batch, total, heads, queries, _v_dim(segments[0])), dtype=torch.float32)
    lses = q.new_empty((batch, total, heads, queries), dtype=torch.float32)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        for segment, first, count in cuts:
            if isinstance(segment, Coded):
                from attlas.kernels.coded import coded_attend

                coded_attend(q, segment, scale, sums, lses, first, count)
            else:
                assert isinstance(segment, HELD)
                kernels.attend(q, segment, scale, sums, lses, first, count)
        return kernels.merged(sums, lses, q.dtype)


def scores_refused(q: Tensor, low: Tensor) -> str | None:
    """Why the kernel cannot score pages."""
    reason = _refuses(q)
    if reason is not None:
        return reason
    if low.dtype != q.dtype:
        return f"summaries are {low.dtype}, queries {q.dtype}"
    if q.shape[1] > ROWS * low.shape[1]:
        return f"more than {ROWS} heads share keys"
    if q.shape[-1] > WIDTH:
        return f"{q.shape[-1]} wide, at most {WIDTH}"
    if not low.numel():
        return "there are no pages"
    return _gradients_wanted(q, low)


def score_pages(q: Tensor, low: Tensor, high: Tensor, *, shared: bool) -> Tensor:
    """`page_scores` by a kernel."""
    from attlas.kernels.pages import score

    q, low, high = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, low, high))
    with torch.cuda.device_of(q):
        return score(q, low, high, shared=shared)


def choice_refused(scores: Tensor) -> str | None:
    """Why the kernel cannot choose pages."""
    if torch.compiler.is_compiling():
        return "torch.compile traces it"
    if not scores.is_cuda:
        return "not on a CUDA device"
    if scores.dtype != torch.float32:
        return f"scores are {scores.dtype}, not float32"
    if not 0 < scores.shape[-1] <= PAGES:
        return f"{scores.shape[-1]} pages, not 1 to {PAGES}"
    return None if has_kernels(scores.device) else "there is no Triton for the device"


def choose_pages(scores: Tensor, count: int) -> Tensor:
    """`best_pages` by a kernel."""
    from attlas.kernels.pages import choose

    with torch.cuda.device_of(scores):
        return choose(scores, count)


def choose_portion(
    scores: Tensor, width: int, lengths: Tensor, page: int, keep: float | None, newest: int
) -> Tensor:
    """`best_portion` by a kernel, which reads on the device how many pages there are."""
    from attlas.kernels.pages import choose

    with torch.cuda.device_of(scores):
        return choose(scores, width, lengths, page, keep, newest)


def _refuses(q: Tensor) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile traces it"
    if not q.is_cuda:
        return "not on a CUDA device"
    if q.dtype not in HALVES:
        return f"queries are {q.dtype}, not of 16 bits"
    return None if has_kernels(q.device) else "there is no Triton for the device"


def _segment_refused(q: Tensor, segment: Dense | Ragged | Listed) -> str | None:
    k, v = segment.k, segment.v
    if not k.dtype == v.dtype == q.dtype:
        return f"keys are {k.dtype}, values {v.dtype}, queries {q.dtype}"
    if not k.is_cuda:
        return "keys are not on a CUDA device"
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        return "keys or values do not lie one number behind the other"
    if max(k.shape[-1], v.shape[-1]) > WIDTH:
        return f"keys are {k.shape[-1]} and values {v.shape[-1]} wide, at most {WIDTH}"
    lists = segment.index if isinstance(segment, Listed) else None
    held = segment.offsets if isinstance(segment, Ragged) else k
    rows = q.shape[1] // (held if lists is None else lists).shape[1] * q.shape[2]
    if rows > ROWS:
        return f"{rows} query rows share keys, at most {ROWS}"
    bias = None if isinstance(segment, Listed) else segment.bias
    return _gradients_wanted(q, k, v, bias)


def _gradients_wanted(*tensors: Tensor | None) -> str | None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return "gradients are wanted"
    return None


def _runs(q: Tensor, segment: Segment, units: int) -> int:
    if isinstance(segment, Coded):
        from attlas.kernels.coded import coded_runs

        return coded_runs(q, segment, units)
    from attlas.kernels.decode import runs

    assert isinstance(segment, HELD)
    return runs(q, segment, units)


def _v_dim(segment: Segment) -> int:
    if isinstance(segment, Coded):
        return segment.v.dim
    assert isinstance(segment, HELD)
    return segment.v.shape[-1]


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether Triton is there, and the device one for whose tensor cores it compiles."""
    return (
        find_spec("triton") is not None
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
