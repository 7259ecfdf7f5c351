"""All tests that need a GPU, many at a time, and what came of them as JSON.

    python tests/gpu.py [--out FILE]      exits as pytest does; refuses to run where there is no GPU
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).parent.parent
#: Of kernels' programs and CUDA contexts at once.
AT_ONCE = 16


def told(report: Path) -> dict[str, object]:
    """Counts by outcome, what failed or was skipped with its reason, and the slowest."""
    counts, why, took = Counter(), {}, {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        took[name] = float(case.get("time", 0))
        wrong = next((x for x in case if x.tag in ("failure", "error", "skipped")), None)
        counts["passed" if wrong is None else wrong.tag] += 1
        if wrong is not None:
            why[f"{wrong.tag}: {name}"] = (wrong.get("message") or "").partition("\n")[0]
    slowest = sorted(took, key=took.__getitem__, reverse=True)[:10]
    return {
        "counts": dict(counts), "not_passed": why,
        "slowest_s": {name: round(took[name], 1) for name in slowest},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/tests-cuda.json")
    out = parser.parse_args().out
    if not torch.cuda.is_available():
        print("make test-gpu needs a CUDA device: there is none", file=sys.stderr)
        return 2
    import triton

    with tempfile.TemporaryDirectory() as folder:
        report, start = Path(folder) / "report.xml", time.perf_counter()
        command = [
            sys.executable, "-m", "pytest", "-m", "gpu", "--numprocesses", str(AT_ONCE),
            "--max-worker-restart", "1000", "--junitxml", str(report), "tests/kernels", "tests/ops",
            "tests/attach",
        ]  # fmt: skip
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        result = {
            "device": torch.cuda.get_device_name(), "python": platform.python_version(),
            "torch": torch.__version__, "triton": triton.__version__,
            "wall_s": round(time.perf_counter() - start, 1), **told(report),
        }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["counts"]), f"in {result['wall_s']} s; {out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
