"""What this machine is, and which routes of `attend` run on it: each is tried on a small case."""

from __future__ import annotations

import os
import platform
import warnings
from dataclasses import dataclass
from importlib.metadata import version

import torch

from attlas import masks, ops
from attlas.ops import ROUTES


@dataclass(frozen=True)
class RouteReport:
    """Whether a route runs on a device, and the largest deviation from the definition there."""

    device: str
    route: str
    runs: bool
    says: str


def machine() -> dict[str, str]:
    """Processor, cores, accelerator and the versions that matter."""
    import attlas

    threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    cuda = torch.cuda.is_available()
    return {
        "machine": f"{_processor()}, {threads}",
        "accelerator": torch.cuda.get_device_name() if cuda else "none",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": (
            f"attlas {attlas.__version__}, torch {torch.__version__}, "
            f"transformers {version('transformers')}"
        ),
    }


def routes() -> list[RouteReport]:
    """Every route of `attend`, tried on each device."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [_tried(device, route) for device in devices for route in ROUTES if route != "auto"]


def _tried(device: str, route: ops.Route) -> RouteReport:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 2, 256, 32) for _ in range(3))
    pattern = masks.causal & masks.window(64)
    wanted, _ = ops.reference(q.double(), k.double(), v.double(), scale=32**-0.5, mask=pattern)
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            found = ops.attend(*(t.to(device) for t in (q, k, v)), mask=pattern, route=route)
    except Exception as error:  # any reason that a route does not run here is what is asked for
        return RouteReport(device, route, False, f"{type(error).__name__}: {error}".split("\n")[0])
    off = float((found.cpu().double() - wanted).abs().max())
    return RouteReport(device, route, off < 1e-2, f"within {off:.1e} of the definition")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
