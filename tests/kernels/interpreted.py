"""Judging a file of kernel cases: on a GPU where there is one, else by Triton's interpreter.

Triton looks for its interpreter when a kernel is defined, so without a GPU the cases run in a process
of their own, one for all: the file, run as a program, prints a line for each.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch

#: What every such file is marked with.
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]


def verdicts(file: str, judge: Callable[[str, str], Any]) -> Callable[[str], Any]:
    """What `judge(name, device)` finds of each case, by its name.

    On a GPU a case is judged when it is asked for, so that one that harms its process can be told from
    its neighbours. The interpreter has no bfloat16: cases that it left out are skipped.
    """
    if torch.cuda.is_available():
        return lambda name: judge(name, "cuda")
    run = subprocess.run(
        [sys.executable, file], capture_output=True, text=True, check=False,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    found = dict(json.loads(line) for line in run.stdout.splitlines())

    def told(name: str) -> Any:
        if name not in found:
            pytest.skip("Triton's interpreter has no bfloat16, and there is no CUDA device")
        return found[name]

    return told
