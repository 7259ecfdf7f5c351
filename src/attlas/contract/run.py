"""Running the contract: `check` for users, `implemented` for the catalogue."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from attlas.catalog.registry import Entry
from attlas.contract import layers, masks, ops, parts
from attlas.contract.measure import CHECKS, Check, Measure, Subject, poisoned, subject_of
from attlas.contract.result import ContractError, Result, Status

#: The modules that hold the checks; importing them fills `CHECKS`.
FAMILIES = (layers, masks, ops, parts)


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
    """The checks that apply to a subject."""
    return [c for c in CHECKS if c.kind == subject.kind and c.applies(subject)]


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


# Verdicts for the catalogue ------------------------------------------------------------------------


def implemented(entry: Entry) -> bool:
    """Whether a registered object passes its checks.

    The verdict is kept in the user's cache directory for these very sources and versions, so that
    the catalogue is quick the second time.
    """
    if not kept(entry):
        verdict = passes(entry)
        keep(entry, verdict)
        return verdict
    return _load()[_key(entry)]


def passes(entry: Entry) -> bool:
    """Whether a registered object passes its checks, run now."""
    return all(result.status != "failed" for result in results_of(subject_of(entry.name)))


def kept(entry: Entry) -> bool:
    """Whether the verdict for these very sources is there already."""
    return _key(entry) in _load()


def keep(entry: Entry, verdict: bool) -> None:
    """Keep a verdict, unless the object's source is not ours to fingerprint."""
    if entry.object.__module__.startswith("attlas."):
        found = {**_load(), _key(entry): verdict}
        _save({k: v for k, v in found.items() if k.startswith(_fingerprint())})


def _key(entry: Entry) -> str:
    return f"{_fingerprint()}:{entry.name}"


@cache
def _fingerprint() -> str:
    """Of every source of the package and of the versions of what it stands on."""
    digest = hashlib.sha256(f"{torch.__version__} {version('transformers')}".encode())
    root = Path(__file__).resolve().parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _file() -> Path:
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("attlas")) / "verdicts.json"


def _load() -> dict[str, bool]:
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
        return {str(k): v for k, v in found.items() if isinstance(v, bool)}
    except (OSError, ValueError, AttributeError):  # none yet, or damaged: check again
        return {}


def _save(verdicts: dict[str, bool]) -> None:
    path = _file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(verdicts, indent=1), encoding="utf-8")
        partial.replace(path)
    except OSError:  # a read-only home: the catalogue is only slower
        return
