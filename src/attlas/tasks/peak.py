"""The peak of memory during a run.

    CUDA: the most that PyTorch had allocated at once, weights included
    CPU:  the most that the process's resident set grew over what it was before
"""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Measures from its making until `bytes()`.

    On Linux the kernel's high-water mark is set back first; where that cannot be done, only growth
    over the highest mark so far shows, so the number is a lower bound.
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self.device = device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _return_free_memory()
            self.before = _reset_high_water()

    def bytes(self) -> int:
        """Peak since the making, in bytes."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return int(torch.cuda.max_memory_allocated(self.device))
        return max(0, _high_water() - self.before)


def _return_free_memory() -> None:
    """Hand what earlier runs freed back to the system, else this one grows into it unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc's alone
        trim(0)


def _reset_high_water() -> int:
    """Sets the mark back where the kernel lets us; returns what is resident now."""
    try:
        _CLEAR.write_text("5")
        return _status("VmRSS")
    except OSError:
        return _high_water()


def _high_water() -> int:
    if _STATUS.exists():
        return _status("VmHWM")
    try:
        import resource
    except ImportError:  # Windows: no such number in the standard library
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0
