"""Shapes in signatures are checked in the rooms whose tests say so; one model load serves a session."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a network
# An int is a float to beartype too, as it is to mypy.
checked = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
hook = install_import_hook("attlas", checked)
_jaxtyped = jaxtyping.jaxtyped


def _outermost(*, typechecker: Any) -> Callable[[Any], Any]:
    """What the hook puts around functions; around those within functions nothing, whose checks would be
    compiled anew whenever they are made: that took most of this suite's time."""
    checks = _jaxtyped(typechecker=typechecker)
    return lambda of: of if "<locals>" in of.__qualname__ else checks(of)


jaxtyping.jaxtyped = _outermost  # type: ignore[assignment]

import pytest  # noqa: E402
import torch  # noqa: E402

#: Transformers' own tests on our models, which are fetched first: `make test-hf`.
collect_ignore = ["hf_suite"]

torch.set_num_threads(int(os.environ.get("ATTLAS_TEST_THREADS", "1")))


class _Deprecated(logging.Handler):
    """Transformers tells of some deprecations in its log alone; they are errors like its warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage():
            raise AssertionError(record.getMessage())


logging.getLogger("transformers").addHandler(_Deprecated())


#: Rooms in which shapes are checked, at two to three times the cost. The contract calls every mechanism's
#: functions so; what trains or generates in other rooms calls the same ones again.
SHAPED = ("contract", "layers", "masks", "models", "ops", "positions", "storage")


@pytest.fixture(autouse=True)
def shapes(request: pytest.FixtureRequest):
    """Shapes in signatures are checked, or not."""
    before = jaxtyping.config.jaxtyping_disable
    room = request.path.relative_to(Path(__file__).parent).parts[0]
    jaxtyping.config.update("jaxtyping_disable", before or room not in SHAPED)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def unharmed():
    """After an illegal access nothing in a process can use the GPU again: the process ends.

    pytest-xdist tells of it as a failure of this test, and gives the others a new process.
    """
    yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"the GPU cannot be used any more: {error}", file=sys.stderr, flush=True)
            os._exit(1)


@pytest.fixture(scope="session")
def smollm2():
    """(model, tokenizer) of SmolLM2-135M-Instruct."""
    from real_models import fetched

    return fetched("smollm2")


@pytest.fixture(scope="session")
def gemma3_270m():
    """(model, tokenizer) of Gemma 3 270M."""
    from real_models import fetched

    return fetched("gemma3-270m")
