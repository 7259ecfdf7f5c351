"""How cases tell rotary positions: "two halves, base 10000", "adjacent pairs, ...", true or false."""

from __future__ import annotations

import re

from attlas.errors import UserError
from attlas.positions import RoPE

#: Words for how a head's channels are paired, and whether pairs stand side by side.
PAIRS = {"adjacent": True, "interleaved": True, "half": False, "halves": False}


def rope_of(told: object, width: int, *, interleaved: bool | None = None) -> RoPE | None:
    """The rotation that a config tells, for heads so wide; None for none.

    Args:
        told: what the config says.
        width: of a head.
        interleaved: how channels are paired where the config does not say.

    Raises:
        UserError: words that say neither a base nor how channels are paired, or another pairing than
            the published program has.
    """
    text = "" if told in (None, False, True) else str(told).lower().strip()
    if told in (None, False) or text in ("none", "false"):
        return None
    number = re.search(r"(?:base|theta)\s*([\d.]+(?:e\+?\d+)?)", text)
    said = {PAIRS[word] for word in re.findall(r"[a-z]+", text) if word in PAIRS}
    pairs = said or {interleaved}
    if (text and not said and number is None) or len(pairs) != 1 or pairs == {None}:
        raise UserError(f"config 'rope' is {told!r}, which tells no known rotation")
    if None not in (interleaved, *pairs) and pairs != {interleaved}:
        raise UserError(f"config 'rope' is {told!r}; the program pairs channels otherwise")
    return RoPE(width, float(number[1]) if number else 1e4, interleaved=bool(pairs.pop()))
