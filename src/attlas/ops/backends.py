"""Which of SDPA's backends is fastest here, measured once for each class of shapes and kept.

SDPA's own choice is not always the fastest (on Hopper it may take FlashAttention-2 where cuDNN takes
0.6 of the time), and papers age faster than drivers: so the first call of a class times each
backend on tensors of its own shape, and the answer is kept in the user's cache directory.
"""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.backends import cuda
from torch.nn.attention import SDPBackend
from torch.nn.functional import pad, scaled_dot_product_attention

DEFAULT = "default"
#: Routes of SDPA on a GPU, by the names that are kept.
CANDIDATES = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
#: Where cuDNN may give the gradients: SDPA's own choice on Hopper is cuDNN too.
_BY_CUDNN = (DEFAULT, "cudnn")
#: Backends that may be taken where cuDNN's gradients cannot be relied on.
_SOUND = ("flash", "efficient", "math")
#: Each backend's switch: whether it may be taken, and how that is set.
_SWITCHES: dict[str, tuple[Callable[[], bool], Callable[[bool], None]]] = {
    "cudnn": (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    "flash": (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    "efficient": (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    "math": (cuda.math_sdp_enabled, cuda.enable_math_sdp),
}
#: A backend must beat SDPA's own choice by this much, or noise would decide.
MARGIN = 0.97

#: Choices of this process, and those kept on disk by readable names.
_chosen: dict[tuple[Any, ...], str] = {}
_kept: dict[str, str] | None = None


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any], q_shape: torch.Size,
    v_shape: torch.Size,
) -> Tensor:  # fmt: skip
    """`scaled_dot_product_attention` on the backend that is fastest for this class of shapes.

    Args:
        q: queries.
        k: keys.
        v: values, of as many heads as the keys.
        arguments: its others, by name.
        q_shape: q's, which a small call would notice being asked for again.
        v_shape: v's.
    """
    if not q.is_cuda and q_shape[3] != v_shape[3]:
        return _as_wide(q, k, v, arguments)
    if not q.is_cuda or torch.compiler.is_compiling():
        return scaled_dot_product_attention(q, k, v, **arguments)
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    key = shape_class(q, q_shape, v_shape, arguments, trains)
    name = _chosen.get(key) or _choice(key, q, k, v, arguments)
    return _called(name, q, k, v, arguments, trains)


def _called(
    name: str, q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any], trains: bool
) -> Tensor:
    """SDPA by the backend of this name; where cuDNN may give the gradients, only if they are right."""
    if not trains or name not in _BY_CUDNN:
        return _by(name, q, k, v, arguments)
    if loses_gradients(q, k, arguments):
        return _among(_SOUND, q, k, v, arguments)
    # PyTorch keeps cuDNN's backward by the layouts of q, k and v, and goes on with it when the
    # gradient comes in another layout than the first one did: 140 % off (PyTorch 2.11). So all of
    # ours come in one layout, and no dropout at all, written as another zero, is a key of its own.
    # It is one for all, and none that v's own would tell: autocast lays tensors otherwise within.
    out = _by(name, q, k, v, {**arguments, "dropout_p": -0.0})
    _hooked(out, _token_first)
    return out


def _by(name: str, q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> Tensor:
    if name == DEFAULT:
        return scaled_dot_product_attention(q, k, v, **arguments)
    return _among((name,), q, k, v, arguments)


def _among(
    names: tuple[str, ...], q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]
) -> Tensor:
    """SDPA by one of these backends: `torch.nn.attention.sdpa_kernel`, whose own ten microseconds are
    more than most calls of a decoder's step take."""
    before = [(switch, enabled()) for enabled, switch in _SWITCHES.values()]
    try:
        for name, (_, switch) in _SWITCHES.items():
            switch(name in names)
        return scaled_dot_product_attention(q, k, v, **arguments)
    finally:
        for switch, enabled in before:
            switch(enabled)


def _hooked(out: Tensor, hook: Callable[[Tensor], Tensor | None]) -> None:
    """`out.register_hook(hook)` for a tensor just made, without the handle that would take the hook
    away: half the time of both passes, which a small call can see."""
    out._backward_hooks = OrderedDict({-1: hook})
    out.grad_fn._register_hook_dict(out)  # type: ignore[union-attr]


def _token_first(gradient: Tensor) -> Tensor | None:
    """As [batch, tokens, heads, dim] lies in memory, which is how a merge of heads hands it back."""
    _, heads, tokens, dim = gradient.shape
    if gradient.stride() == (heads * tokens * dim, dim, heads * dim, 1):
        return None  # as it is
    return gradient.transpose(1, 2).contiguous().transpose(1, 2)


def loses_gradients(q: Tensor, k: Tensor, arguments: dict[str, Any]) -> bool:
    """Whether cuDNN, SDPA's own choice on Hopper, may give gradients that are wrong.

    With a mask, and half a tile of 128 keys left over, it scores what is not there as 0: its exponential
    overflows where all scores of a row lie below -88 (PyTorch 2.11 to 2.13; massive activations give
    such rows). With one query, likewise (cuDNN 9.26). With dropout no call has a plan of its own.
    """
    partial = arguments.get("attn_mask") is not None and k.shape[2] % 128 == 64
    return partial or arguments.get("dropout_p", 0.0) > 0 or q.shape[2] == 1


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


def shape_class(
    q: Tensor, q_shape: torch.Size, v_shape: torch.Size, arguments: dict[str, Any], trains: bool
) -> tuple[Any, ...]:
    """Calls that share a choice: same device, type and widths; sizes within a factor of two."""
    batch, heads, queries, dim = q_shape
    _, kv_heads, keys, v_dim = v_shape
    return (
        q.get_device(), q.dtype, dim, v_dim, (batch * heads).bit_length(), heads // kv_heads,
        queries.bit_length(), keys.bit_length(), arguments.get("is_causal", False),
        arguments.get("attn_mask") is not None, arguments.get("dropout_p", 0.0) > 0, trains,
    )  # fmt: skip


def _choice(
    key: tuple[Any, ...], q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]
) -> str:
    """The backend for a class of which this process has seen no call yet."""
    if torch.cuda.is_current_stream_capturing():
        return DEFAULT
    kept = _load()
    name = " ".join(map(str, (torch.__version__, torch.cuda.get_device_name(key[0]), *key[1:])))
    if name not in kept:
        kept[name] = _measure(q, k, v, arguments, trains=key[-1])
        _save(kept)
    _chosen[key] = kept[name]
    return _chosen[key]


def _measure(
    q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any], *, trains: bool
) -> str:
    """The fastest backend, each timed as it will be called, its selection included."""
    q, k, v = (t.detach().clone().requires_grad_(trains) for t in (q, k, v))

    def run(name: str) -> None:
        out = _called(name, q, k, v, arguments, trains)
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
