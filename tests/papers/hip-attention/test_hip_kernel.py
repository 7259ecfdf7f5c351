"""Scores of listed blocks by the kernel, run by Triton's interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from interpreted import MARKS, answer, verdicts

from attlas.ops import cells

pytestmark = MARKS

#: What a case is when it says nothing else.
PLAIN: dict[str, Any] = {
    "batch": 1, "heads": 2, "kv": 1, "rows": 3, "queries": 16, "stride": 1, "blocks": 9, "size": 2,
    "cells": 5, "dim": 16, "dtype": "float32",
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "pairs of keys": {},
    "single keys": {"size": 1, "blocks": 20, "cells": 7},
    "a tile and more": {"size": 32, "blocks": 12, "cells": 9},
    "blocks that fill a tile": {"size": 128, "blocks": 3, "cells": 3},
    "every second query, few of them": {"queries": 6, "stride": 2},
    "batch and groups": {"batch": 2, "heads": 6, "kv": 2, "dim": 64},
    "float16": {"dtype": "float16", "dim": 32},
}


def errors(name: str, device: str = "cpu") -> list[tuple[float, float]]:
    """The kernel's against float64, and what is allowed: twice the plain form's."""
    case = {**PLAIN, **CASES[name]}
    torch.manual_seed(0)
    q = torch.randn(case["batch"], case["heads"], case["rows"], case["queries"], case["dim"])
    k = torch.randn(case["batch"], case["kv"], case["blocks"] + 1, case["size"], case["dim"])
    given = [x.to(device, getattr(torch, case["dtype"])) for x in (q, k)]
    given = [given[0][:, :, :, :: case["stride"]], given[1][:, :, 1:]]
    shape = case["batch"], case["heads"], case["rows"], case["cells"]
    at = torch.randint(0, case["blocks"], shape).to(device)
    taken = patch.object(cells, "refuses", lambda *_: None) if device == "cpu" else nullcontext()
    with taken, patch.object(torch.cuda, "device_of", lambda _: nullcontext()):
        found = cells.block_products(*given, at)
    with patch.object(cells, "refuses", lambda *_: "asked not to"):
        plain, exact = (cells.block_products(*x, at) for x in (given, [t.double() for t in given]))
    unit = torch.finfo(torch.float32).eps * float(exact.abs().max())
    off, allowed = (float((x.double() - exact).abs().max()) for x in (found, plain))
    return [(off, 2 * allowed + 4 * unit)]


@pytest.fixture(scope="module")
def judged() -> Iterator[Callable[[str], Any]]:
    with verdicts(__file__, errors) as told:
        yield told


@pytest.mark.parametrize("name", CASES)
def test_scores_by_the_kernel_are_as_exact_as_the_plain_form(name: str, judged: Any) -> None:
    for error, allowed in judged(name):
        assert error <= allowed


if __name__ == "__main__":
    answer(errors, CASES)
