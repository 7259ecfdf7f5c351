"""Running a file of kernel cases through Triton's interpreter.

Triton looks for its interpreter when a kernel is defined, so without a GPU the cases run in a process
of their own.
"""

import os
import subprocess
import sys


def interpreted(file: str) -> str:
    """What the file, run as a program under the interpreter, prints."""
    run = subprocess.run(
        [sys.executable, file], capture_output=True, text=True, check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout
