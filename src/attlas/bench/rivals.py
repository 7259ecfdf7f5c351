"""What a user could take in attlas's place, where it is installed: flash-attn, FlashInfer, fla.

None is needed by attlas. Each function gives a call over the same numbers as attlas's, or None where the
package or a form of the operation is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from attlas.ops.backends import CANDIDATES

#: Package as it is imported -> as it is installed.
PACKAGES = {
    "flash_attn": "flash-attn", "flashinfer": "flashinfer-python", "fla": "flash-linear-attention",
}  # fmt: skip
#: SDPA's own choice, and each of its routes; of these a CPU has flash alone.
ROUTES = {"SDPA": None, **{f"SDPA {name}": route for name, route in CANDIDATES.items()}}

#: One run: its result, and gradients behind it where they are asked for.
Run = Callable[[], Tensor | tuple[Tensor, ...]]
One = Callable[[], Tensor]


def installed() -> dict[str, str]:
    """Versions of the packages that are here, by the name they are installed under."""
    found = {}
    for module, package in PACKAGES.items():
        if find_spec(module) is not None:
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = "unknown"
    return found


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Iterator[tuple[str, One]]:
    """PyTorch's attention by every route of this device."""
    grouped = q.shape[1] != k.shape[1]
    for name, route in ROUTES.items():
        if name not in ("SDPA", "SDPA flash") and not q.is_cuda:
            continue

        def run(route: SDPBackend | None = route) -> Tensor:
            if route is None:
                return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
            with sdpa_kernel(route):
                return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

        yield name, run


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> One | None:
    """flash-attn's call, tokens first as it takes them."""
    if not _here("flash_attn", q):
        return None
    flash_attn_func = import_module("flash_attn").flash_attn_func
    tokens_first = [x.transpose(1, 2) for x in (q, k, v)]
    return lambda: flash_attn_func(*tokens_first, causal=causal).transpose(1, 2)


def flashinfer_decode(q: Tensor, k: Tensor, v: Tensor) -> One | None:
    """FlashInfer's decoding of one sequence."""
    if not _here("flashinfer", q) or q.shape[0] != 1:
        return None
    single = import_module("flashinfer").single_decode_with_kv_cache
    keys, values = (x[0].transpose(0, 1).contiguous() for x in (k, v))
    query = q[0, :, 0]
    return lambda: single(query, keys, values)[None, :, None]


def linear_attention(kind: str, call: dict[str, Any]) -> One | None:
    """flash-linear-attention's operation for a recurrence of `ops.recurrence`, tokens first.

    Args:
        kind: "none", "head", "token", "channel", "delta", "gated delta" or "low rank".
        call: arguments of `ops.recurrence`, in whose order of axes the result comes.
    """
    if not _here("fla", call["q"]):
        return None
    first = {n: x.transpose(1, 2) for n, x in call.items() if isinstance(x, Tensor) and x.ndim > 1}
    q, k, v, g, beta = (first.get(n) for n in ("q", "k", "v", "log_decay", "beta"))
    given: dict[str, tuple[str, str, tuple[Any, ...], dict[str, Any]]] = {
        "none": ("simple_gla", "chunk_simple_gla", (q, k, v), {"g": None}),
        "head": ("simple_gla", "chunk_simple_gla", (q, k, v), {"g_gamma": call.get("log_decay")}),
        "token": ("simple_gla", "chunk_simple_gla", (q, k, v), {"g": g}),
        "channel": ("gla", "chunk_gla", (q, k, v, g), {}),
        "delta": ("delta_rule", "chunk_delta_rule", (q, k, v, beta), {}),
        "gated delta": ("gated_delta_rule", "chunk_gated_delta_rule", (q, k, v, g, beta), {}),
    }
    if kind == "low rank":
        a, b = (x.transpose(1, 2) for x in call["low_rank"])
        # Its update reads S ← S (diag + b aᵀ): the two change places.
        given[kind] = ("generalized_delta_rule", "chunk_dplr_delta_rule", (q, k, v, b, a, g), {})
    module, name, arguments, options = given[kind]
    operation = getattr(import_module(f"fla.ops.{module}"), name)
    return lambda: operation(*arguments, **options)[0].transpose(1, 2)


def _here(package: str, x: Tensor) -> bool:
    """Whether a package of GPU kernels is installed and this is a type that it takes."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return x.is_cuda and half and find_spec(package) is not None
