"""What a check says: one result, one line of `attlas verify --json`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

#: How a check ended. "expected failure" carries its reason; one that passes after all is "failed".
Status = Literal["passed", "failed", "no adapter", "expected failure"]


@dataclass(frozen=True)
class Result:
    """One check of one mechanism.

    Args:
        name: the mechanism, as the registry calls it; a case without an adapter gives its folder.
        case: the reference vectors' folder and file, or the mechanism's configuration.
        check: what was looked at.
        error: largest deviation; None where there is nothing to measure.
        bound: what `error` may be at most, at that place.
        status: how it ended.
        reason: of a failure, expected or not.
    """

    name: str
    case: str
    check: str
    error: float | None
    bound: float | None
    status: Status
    reason: str = ""

    def line(self) -> str:
        """As one JSON object; what is not finite becomes null, which JSON has no number for."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }
        return json.dumps(finite, ensure_ascii=False)


class ContractError(AssertionError):
    """A mechanism broke its contract; the message lists every check that failed."""

    def __init__(self, failures: Iterable[Result]) -> None:
        self.failures = list(failures)
        lines = [f"  {r.name} [{r.case}] {r.check}: {r.reason}" for r in self.failures]
        super().__init__(f"{len(lines)} checks failed\n" + "\n".join(lines))
