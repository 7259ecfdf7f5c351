"""Running the contract: `check` for users, and for `attlas verify`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from attlas.contract.measure import CHECKS, Check, Measure, Subject, poisoned, subject_of
from attlas.contract.result import ContractError, Result, Status


def check(thing: Any, *, raises: bool = True) -> list[Result]:
    """Hold a mechanism to the contract.

    Args:
        thing: a registered name, class or function, an instance of one, or an `attlas.Attention` of
            your own that is not registered.
        raises: raise when a check fails; without, failures are among the results.

    Raises:
        ContractError: a check failed; an AssertionError that lists all failures.
        UnknownName: a name that nothing is registered under.
        TypeError: an object that is no mechanism.
    """
    results = list(results_of(subject_of(thing)))
    failures = [result for result in results if result.status == "failed"]
    if raises and failures:
        raise ContractError(failures)
    return results


def checks_of(subject: Subject) -> list[Check]:
    """The checks that apply to a subject: of the families that its kind signs, in that order."""
    for module in subject.kind.checks:  # importing it fills `CHECKS`
        importlib.import_module(module)
    families = subject.kind.signs
    found = [c for family in families for c in CHECKS if c.family == family]
    return [c for c in found if c.applies(subject)]


def results_of(subject: Subject) -> Iterator[Result]:
    """One result for each check that applies, and one for each expected failure of no check."""
    expected = dict(subject.expected_failures)
    for one in checks_of(subject):
        yield _judged(subject, one, expected.pop(one.name, None))
    for name in expected:
        reason = "expected_failures names it, but no such check applies"
        yield Result(subject.name, "expected_failures", name, None, None, "failed", reason)


def _judged(subject: Subject, one: Check, expected: str | None) -> Result:
    status: Status
    try:
        worst = _worst(subject, one)
        failed = not worst.error <= worst.bound
        reason = worst.reason or f"off by {worst.error:.3g}, {worst.bound:.3g} is allowed"
    except Exception as error:  # what a mechanism raises is that check's failure
        worst, failed = Measure("", math.nan, math.nan), True
        reason = f"{type(error).__name__}: {error}".strip()
    if expected is None:
        status, reason = ("failed", reason) if failed else ("passed", "")
    elif failed:
        status, reason = "expected failure", expected
    else:
        status, reason = "failed", f"passes, though it was expected to fail: {expected}"
    return Result(
        subject.name, worst.case, one.name, _number(worst.error), _number(worst.bound), status, reason
    )


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _worst(subject: Subject, one: Check) -> Measure:
    """The measure that comes nearest to its bound, or is farthest beyond it."""
    # Only the CPU's generator: forking the others' would wake every device.
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), _one_thread():
        torch.manual_seed(0)
        with poisoned() if one.poisoned else nullcontext():
            measures = list(one.look(subject))
    if not measures:
        raise ValueError("the check measured nothing")
    return max(measures, key=_closeness)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors this small are done before threads have met; on a busy machine ten times sooner."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _closeness(measure: Measure) -> float:
    if measure.bound > 0:
        return measure.error / measure.bound
    return float("inf") if measure.error != 0 else 0.0
