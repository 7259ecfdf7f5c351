"""The one place where attlas meets Transformers; everything else imports from here.

`attlas.hf.caches` has caches and the names under which they travel, `attlas.hf.interface` how attention
is taken hold of, `attlas.hf.models` what models and tokenizers are made of. What differs between
versions, and every private name that is left, stands in these files alone; docs/transformers.md lists
both. Nothing here is imported before it is needed.
"""

from __future__ import annotations

import torch
import transformers

from attlas.errors import UserError

#: First version that works, and the first that has not been tried, by package; as in pyproject.toml.
RANGES = {"torch": ((2, 11), (2, 16)), "transformers": ((5, 17), (5, 25))}


def check_version(package: str, found: str) -> None:
    """Refuse a version that attlas was not made for.

    Raises:
        ValueError: a version out of range, with the command that brings one within it.
    """
    first, end = RANGES[package]
    major, minor = (int(number) for number in found.split(".")[:2])
    if not first <= (major, minor) < end:
        low, high = (".".join(map(str, version)) for version in (first, end))
        raise UserError(
            f"attlas works with {package} from {low} to before {high}, and found {found}; "
            f"pip install '{package}>={low},<{high}'"
        )


check_version("torch", torch.__version__)
check_version("transformers", transformers.__version__)
