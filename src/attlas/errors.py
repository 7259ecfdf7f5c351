"""Errors that a user can mend: one sentence that names the thing and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

#: Names that one sentence can hold.
FEW = 20


class UserError(ValueError):
    """A mistake in what the user asked for; the command line prints it alone and exits with 2."""


class UnknownName(UserError):
    """A name that nothing carries; the message suggests the nearest known ones.

    Args:
        what: it names.
        got: the name.
        known: names that there are.
    """

    def __init__(self, what: str, got: str, known: Iterable[str]) -> None:
        names = sorted(set(known))
        near = get_close_matches(got, names, n=3, cutoff=0.5)
        if near:
            hint = f"did you mean {' or '.join(repr(n) for n in near)}?"
        elif len(names) <= FEW:
            hint = f"known: {names}"
        else:
            hint = f"none of the {len(names)} known comes near; `attlas list` shows them"
        super().__init__(f"unknown {what} {got!r}; {hint}")
        self.near = near


def exactly_one(what: str, **options: object) -> None:
    """Nothing, if one of the options is given and the others are None.

    Raises:
        ValueError: otherwise, naming the options and those that were given.
    """
    given = [name for name, value in options.items() if value is not None]
    if len(given) != 1:
        *others, last = (f"{name}=" for name in options)
        raise UserError(
            f"{what} takes exactly one of {', '.join(others)} or {last}, got "
            + (" and ".join(given) or "none")
        )


def at_least_one(name: str, value: int) -> int:
    """`value` if it is a whole number of at least 1.

    Raises:
        ValueError: otherwise, naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} takes a whole number of at least 1, got {value!r}")
    return value
