"""Which of SDPA's backends is fastest here, measured once for each class of shapes and kept.

SDPA's own choice is not always the fastest (on Hopper it may take FlashAttention-2 where cuDNN takes
0.6 of the time), and papers age faster than drivers: so the first call of a class times each
backend on tensors of its own shape, and the answer is kept in the user's cache directory.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

DEFAULT = "default"
#: Routes of SDPA on a GPU, by the names that are kept.
CANDIDATES = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
#: Backends in the order that they are tried in where cuDNN's gradients cannot be relied on.
_SOUND = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
#: A backend must beat SDPA's own choice by this much, or noise would decide.
MARGIN = 0.97

#: Choices of this process, and those kept on disk by readable names.
_chosen: dict[tuple[Any, ...], str] = {}
_kept: dict[str, str] | None = None


def sdpa(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
    """`scaled_dot_product_attention` on the backend that is fastest for this class of shapes."""
    if not q.is_cuda and q.shape[-1] != v.shape[-1]:
        return _as_wide(q, k, v, arguments)
    if q.is_cuda and not torch.compiler.is_compiling():
        return _called(_choice(q, k, v, arguments), q, k, v, arguments)
    return scaled_dot_product_attention(q, k, v, **arguments)


def _called(name: str, q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> Tensor:
    """SDPA by the backend of this name; where cuDNN may give the gradients, only if they are right."""
    if _trains(q, k, v) and name in (DEFAULT, "cudnn"):
        if loses_gradients(q, k, v, arguments):
            with sdpa_kernel(_SOUND):
                return scaled_dot_product_attention(q, k, v, **arguments)
        # PyTorch keeps cuDNN's backward by the layouts of q, k and v, and goes on with it when the
        # gradient comes in another layout than the first one did: 140 % off (PyTorch 2.11). So all of
        # ours come in one layout, and no dropout at all, written as another zero, is a key of its own.
        arguments = {**arguments, "dropout_p": -0.0}
        out = _by(name, q, k, v, arguments)
        out.register_hook(_token_first)
        return out
    return _by(name, q, k, v, arguments)


def _by(name: str, q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> Tensor:
    with nullcontext() if name == DEFAULT else sdpa_kernel(CANDIDATES[name]):
        return scaled_dot_product_attention(q, k, v, **arguments)


def _token_first(gradient: Tensor) -> Tensor:
    """As [batch, tokens, heads, dim] lies in memory, which is how a merge of heads hands it back."""
    return gradient.transpose(1, 2).contiguous().transpose(1, 2)


def loses_gradients(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> bool:
    """Whether cuDNN, SDPA's own choice on Hopper, may give gradients that are wrong.

    With a mask, and half a tile of 128 keys left over, it scores what is not there as 0: its exponential
    overflows where all scores of a row lie below -88 (PyTorch 2.11 to 2.13; massive activations give
    such rows). With one query, likewise (cuDNN 9.26). With dropout no call has a plan of its own.
    """
    partial = arguments.get("attn_mask") is not None and k.shape[2] % 128 == 64
    drops = arguments.get("dropout_p", 0.0) > 0
    return _trains(q, k, v) and (partial or drops or q.shape[2] == 1)


def _as_wide(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The narrower of keys and values filled up with zeros: a CPU fuses equal widths alone.

    Without it SDPA holds all pairs in memory and takes four times as long at 1024 tokens.
    """
    width = max(q.shape[-1], v.shape[-1])
    scale = arguments.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, wide = (pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
    out = scaled_dot_product_attention(q, k, wide, **{**arguments, "scale": scale})
    return out[..., : v.shape[-1]]


def shape_class(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """Calls that share a choice: same device, type and widths; sizes within a factor of two."""
    batch, heads, queries, dim = q.shape
    return (
        q.device.index, q.dtype, dim, v.shape[3], (batch * heads).bit_length(),
        heads // k.shape[1], queries.bit_length(), k.shape[2].bit_length(),
        arguments.get("is_causal", False), arguments.get("attn_mask") is not None,
        arguments.get("dropout_p", 0.0) > 0, _trains(q, k, v),
    )  # fmt: skip


def _trains(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


def _choice(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> str:
    key = shape_class(q, k, v, arguments)
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return DEFAULT
        kept = _load()
        name = " ".join(map(str, (torch.__version__, torch.cuda.get_device_name(key[0]), *key[1:])))
        if name not in kept:
            kept[name] = _measure(q, k, v, arguments)
            _save(kept)
        _chosen[key] = kept[name]
    return _chosen[key]


def _measure(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> str:
    """The fastest backend, each timed as it will be called, its selection included."""
    trains = _trains(q, k, v)
    q, k, v = (t.detach().clone().requires_grad_(trains) for t in (q, k, v))

    def run(name: str) -> None:
        out = _called(name, q, k, v, arguments)
        if trains:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    best, best_time = DEFAULT, _time(lambda: run(DEFAULT)) * MARGIN
    for name in CANDIDATES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # why a backend does not take the call is no news
                taken = _time(lambda name=name: run(name))  # type: ignore[misc]
        except RuntimeError:  # this backend does not take this call
            continue
        if taken < best_time:
            best, best_time = name, taken
    return best


def _time(run: Callable[[], None], repeats: int = 7) -> float:
    """Median milliseconds on the device, after two runs to warm up.

    All runs are queued at once, as in a model: a lone call would time its launch instead.
    """
    run()
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    events[-1].synchronize()
    times = [float(a.elapsed_time(b)) for a, b in pairwise(events)]
    return sorted(times)[repeats // 2]


def _file() -> Path:
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("attlas")) / "sdpa-backends.json"


def _load() -> dict[str, str]:
    global _kept
    if _kept is None:
        try:
            found = json.loads(_file().read_text())
            _kept = {k: n for k, n in found.items() if n == DEFAULT or n in CANDIDATES}
        except (OSError, ValueError, AttributeError):  # none yet, or not ours: measure again
            _kept = {}
    return _kept


def _save(known: dict[str, str]) -> None:
    path = _file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(known, indent=1))
        partial.replace(path)
    except OSError:  # a read-only home: the choice lives as long as the process
        return
