"""Which of SDPA's backends is fastest here, measured once for each class of shapes and kept.

SDPA's own choice is not always the fastest (on Hopper it may take FlashAttention-2 where cuDNN takes
0.6 of the time), and papers age faster than drivers: so the first call of a class times each
backend on tensors of its own shape, and the answer is kept in the user's cache directory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

DEFAULT = "default"
_CANDIDATES = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
#: A backend must beat SDPA's own choice by this much, or noise would decide.
MARGIN = 0.97

_known: dict[str, str] | None = None


def sdpa(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    """`scaled_dot_product_attention` on the backend that is fastest for this class of shapes."""
    name = DEFAULT
    if q.is_cuda and not torch.compiler.is_compiling():
        name = _choice(q, k, v, arguments)
    if name == DEFAULT:
        return scaled_dot_product_attention(q, k, v, **arguments)
    with sdpa_kernel(_CANDIDATES[name]):
        return scaled_dot_product_attention(q, k, v, **arguments)


def shape_class(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> str:
    """Calls that share a choice: same device, type and widths; sizes within a factor of two."""
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return "|".join(
        map(str, (
            torch.__version__, torch.cuda.get_device_name(q.device), q.dtype, q.shape[-1],
            v.shape[-1], _bucket(q.shape[0] * q.shape[1]), q.shape[1] // k.shape[1],
            _bucket(q.shape[2]), _bucket(k.shape[2]), arguments.get("is_causal", False),
            arguments.get("attn_mask") is not None, arguments.get("dropout_p", 0.0) > 0, trains,
        ))
    )  # fmt: skip


def _choice(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> str:
    known = _load()
    key = shape_class(q, k, v, arguments)
    if key not in known:
        if torch.cuda.is_current_stream_capturing():
            return DEFAULT
        known[key] = _measure(q, k, v, arguments)
        _save(known)
    return known[key]


def _measure(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> str:
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    q, k, v = (t.detach().clone().requires_grad_(trains) for t in (q, k, v))

    def run() -> None:
        out = scaled_dot_product_attention(q, k, v, **arguments)
        if trains:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    best, best_time = DEFAULT, _time(run) * MARGIN
    for name, backend in _CANDIDATES.items():
        try:
            with sdpa_kernel(backend):
                taken = _time(run)
        except RuntimeError:  # this backend does not take this call
            continue
        if taken < best_time:
            best, best_time = name, taken
    return best


def _time(run: Callable[[], None], repeats: int = 7) -> float:
    """Median milliseconds on the device, after two runs to warm up."""
    run()
    run()
    times: list[float] = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[repeats // 2]


def _bucket(n: int) -> int:
    return round(math.log2(max(n, 1)))


def _file() -> Path:
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("attlas")) / "sdpa-backends.json"


def _load() -> dict[str, str]:
    global _known
    if _known is None:
        try:
            found = json.loads(_file().read_text())
            _known = {k: n for k, n in found.items() if n == DEFAULT or n in _CANDIDATES}
        except (OSError, ValueError, AttributeError):  # none yet, or not ours: measure again
            _known = {}
    return _known


def _save(known: dict[str, str]) -> None:
    path = _file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(known, indent=1))
        partial.replace(path)
    except OSError:  # a read-only home: the choice lives as long as the process
        return
