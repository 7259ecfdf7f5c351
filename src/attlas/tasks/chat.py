"""The model's own chat template, cut where a question begins.

A method such as SnapKV scores keys by the last queries: with the question in the prompt it is told
what to keep; without, it must keep what any question may need. Both are measured, so the template is
cut in two:

    opening   system and user header, then the text
    closing   the question, the end of the user's turn, the header of the assistant's turn
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_MARK = "\N{WHITE SQUARE}context\N{WHITE SQUARE}"


@dataclass(frozen=True, slots=True)
class Template:
    """What stands before the user's text and what stands after it, as strings."""

    opening: str
    closing: str


def template(tokenizer: Any) -> Template:
    """The tokenizer's chat template around a user's turn; its `opening` where it has none."""
    if not getattr(tokenizer, "chat_template", None):
        front = opening(tokenizer)
        return Template("".join(tokenizer.convert_ids_to_tokens(front)) if front else "", "")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
    )
    before, mark, after = text.partition(_MARK)
    if not mark:
        return Template("", "")
    return Template(before, after)


def opening(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts in front of any text, such as Gemma's <bos>; often none."""
    whole, piece = tokenizer("a", verbose=False)["input_ids"], tokens(tokenizer, "a")
    starts = (n for n in range(len(whole)) if whole[n : n + len(piece)] == piece)
    return list(whole[: next(starts, 0)])


def tokens(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a piece of text that stands inside a longer one: nothing is added at its ends."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def line_ends(tokenizer: Any, ids: list[int]) -> list[int]:
    """Positions after which a line ends, so that something may be put in between; 0 is one."""
    pieces = tokenizer.batch_decode([[i] for i in ids])
    return [0, *(n for n, piece in enumerate(pieces, start=1) if piece.endswith("\n"))]
