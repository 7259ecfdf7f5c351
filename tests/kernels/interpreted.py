"""Judging a file of kernel cases: on a GPU where there is one, else by Triton's interpreter.

Triton looks for its interpreter when a kernel is defined, so without a GPU the cases run in a process
of their own: the file, run as a program, answers for one case after the other.
"""

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch

#: What every such file is marked with.
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]


@contextmanager
def verdicts(file: str, judge: Callable[[str, str], Any]) -> Iterator[Callable[[str], Any]]:
    """What `judge(name, device)` finds of each case, by its name.

    A case is judged when it is asked for: on a GPU one that harms its process can be told from its
    neighbours, and of several processes that test each interprets its own alone. The interpreter has no
    bfloat16: cases that it leaves out are skipped.
    """
    if torch.cuda.is_available():
        yield lambda name: judge(name, "cuda")
        return
    # A paper's own kernel cases lie in its folder and find this file by the path.
    path = os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={
            **os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": path,
        },
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None

    def told(name: str) -> Any:
        print(json.dumps(name), file=process.stdin, flush=True)
        answer = process.stdout.readline()
        assert answer, f"the interpreter ended with {process.wait()}"
        found, error = json.loads(answer)
        assert error is None, error
        if found is None:
            pytest.skip("Triton's interpreter has no bfloat16, and there is no CUDA device")
        return found

    with process:  # at its end it closes what the process reads
        yield told


def answer(judge: Callable[[str], Any], cases: Container[str]) -> None:
    """Answer for the cases that are asked for, one a line; for others with nothing."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        name = json.loads(line)
        try:
            found, error = judge(name) if name in cases else None, None
        except Exception:
            found, error = None, traceback.format_exc()
        print(json.dumps([found, error]), flush=True)
