"""Every test of Transformers' mixins that is not run on our models, with the reason."""

from __future__ import annotations

import re

#: (pattern of test classes, pattern of tests): why.
SKIPS: dict[tuple[str, str], str] = {}


def reason(of_class: str, test: str) -> str | None:
    """Why a test is skipped, or None for one that runs."""
    for (classes, tests), why in SKIPS.items():
        if re.fullmatch(classes, of_class) and re.fullmatch(tests, test):
            return why
    return None
