"""A claim's record, as benchmarks/claims/*.json hold it."""

from __future__ import annotations

import math
import os
import platform
import statistics
from typing import Any

Numbers = dict[str, list[float]]


def variance(x: list[float]) -> float:
    """Of a sample; 0 of one number."""
    return statistics.variance(x) if len(x) > 1 else 0.0


def record(
    slug: str, says: str, set_up: str, command: str, numbers: Numbers, judged: str, better: str,
    unit: str = "",
) -> dict[str, Any]:  # fmt: skip
    """What was claimed, how it was tried, and what came out, on this machine."""
    import torch
    import transformers

    return {
        "mechanism": slug, "claim": says, "set_up": set_up, "command": command, "better": better,
        "unit": unit,
        "numbers": [
            {"of": name, "mean": statistics.mean(x), "spread": math.sqrt(variance(x)), "seeds": len(x),
             "all": x}
            for name, x in numbers.items()
        ],
        "verdict": judged,
        "machine": {"device": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
    }  # fmt: skip
