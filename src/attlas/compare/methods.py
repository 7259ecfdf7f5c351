"""The grammar of `--methods`: `full`, `snapkv(keep=0.25)`, `snapkv(keep=0.5)+zipcache(recent=64)`, ...

A method is a name of the registry and options of its constructor, written as Python literals and
read as such: nothing that the user writes is ever evaluated. `+` joins parts that work together. A
bare name of a part that needs a budget, `snapkv`, is read as `snapkv(keep=0.5)`, and so labelled.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from attlas.cache.part import CachePart, check_together
from attlas.catalog import registry
from attlas.catalog.kinds import PARTS
from attlas.errors import UnknownName, UserError

#: Attention as the model has it: every key is kept. It is what the others are compared with.
FULL = "full"

_WRITTEN = re.compile(r"\s*([A-Za-z][\w-]*)\s*(\(.*\))?\s*", re.DOTALL)


#: The budget of a part that needs one and is named alone.
KEEP = 0.5

#: A part of a method: its name and its options.
Named = tuple[str, tuple[tuple[str, Any], ...]]


@dataclass(frozen=True)
class Method:
    """A method of the grid: its label is written one way, however the user wrote it.

    Attributes:
        label: the method as it is written.
        named: its parts; none for full attention.
    """

    label: str
    named: tuple[Named, ...] = ()

    @property
    def thins(self) -> bool:
        """Whether a part of it thins out the attention of a prompt, and so tells its density."""
        names = {name for name, _ in self.named}
        return any(
            entry.name in names and _preset(entry) == "prefill" for entry in registry.entries(*PARTS)
        )

    def parts(self) -> tuple[Any, ...]:
        """Fresh parts to attach, none for full attention.

        Raises:
            ValueError: an option that a part does not take or takes otherwise, or parts that cannot
                work together.
        """
        made = tuple(registry.make(name, **dict(options)) for name, options in self.named)
        check_together([part for part in made if isinstance(part, CachePart)])
        return made


def parse_methods(texts: Iterable[str]) -> tuple[Method, ...]:
    """All methods named in `texts`, each a list with commas; a method named twice counts once.

    Raises:
        UserError: a method that cannot be read, or one that cannot be made, and why.
    """
    found = {m.label: m for text in texts for m in map(parse_method, split(text))}
    if not found:
        raise UserError("methods names no method; write for example full,snapkv(keep=0.25)")
    return tuple(found.values())


def comparable(preset: str = "cache") -> list[str]:
    """Full attention and every method that a part of a preset says is comparable, by the part's name."""
    found = [FULL]
    for entry in registry.entries(*PARTS):
        if _preset(entry) == preset:
            found += [entry.name + rest for rest in vars(entry.object).get("comparable", ())]
    return found


def _preset(entry: registry.Entry) -> str:
    kind: Any = entry.object
    return str(kind.preset)


def parse_method(text: str) -> Method:
    """One method, checked by making it once.

    Raises:
        UnknownName: no part has this name; the nearest are suggested.
        UserError: the grammar or the options are wrong, or parts cannot work together.
    """
    pieces = list(split(text, "+"))
    name, options = parse_call("method", pieces[0] if pieces else text)
    if name.lower() == FULL and len(pieces) == 1:
        if options:
            raise UserError(f"method {FULL!r} takes no options, got {sorted(options)}")
        return Method(FULL)
    named = tuple(_named(piece) for piece in pieces)
    label = "+".join(written(*one) for one in named)
    method = Method(label, named)
    try:
        method.parts()
    except ValueError as error:
        raise UserError(f"method {label}: {error}") from error
    except TypeError as error:
        raise UserError(f"method {label}: an option is of the wrong type ({error})") from error
    return method


def _named(text: str) -> Named:
    name, options = parse_call("method", text)
    entry = _part(name)
    order = list(registry.signature(entry.object))
    if "(" not in text and "keep" in order and not _made_alone(entry):
        options = {"keep": KEEP}
    given = tuple(
        sorted(options.items(), key=lambda o: order.index(o[0]) if o[0] in order else len(order))
    )
    return entry.name, given


def _made_alone(entry: registry.Entry) -> bool:
    try:
        registry.make(entry.name)
    except (TypeError, ValueError):
        return False
    return True


def split(text: str, between: str = ",") -> Iterator[str]:
    """The pieces between commas, or other signs, that stand in no bracket and no quotes."""
    depth, quote, piece = 0, "", ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in "([{":
            depth += 1
        elif sign in ")]}":
            depth -= 1
        if sign == between and depth == 0 and not quote:
            yield piece
            piece = ""
        else:
            piece += sign
    if piece.strip():
        yield piece


def _part(name: str) -> registry.Entry:
    parts = registry.entries(*PARTS)
    try:
        entry = registry.find(name)
    except UnknownName:
        known = [FULL, *(known for part in parts for known in part.names)]
        raise UnknownName("method", name, known) from None
    if entry.kind not in PARTS:
        raise UserError(
            f"method {name!r} is a {entry.kind.name}, which cannot be attached to a pretrained model; "
            f"compare takes {FULL!r} and the parts {[part.name for part in parts]}"
        )
    return entry


def parse_call(what: str, text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of `name(option=value, ...)`; `what` it names stands in the messages.

    Raises:
        UserError: it is written otherwise.
    """
    matched = _WRITTEN.fullmatch(text)
    if matched is None:
        raise UserError(f"{what} {text.strip()!r} cannot be read; write name(option=value, ...)")
    try:
        call = ast.parse(f"f{matched[2] or '()'}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError("options are written name=value")
        return matched[1], {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise UserError(
            f"{what} {text.strip()!r} cannot be read; write name(option=value, ...) with plain "
            "values such as 0.25, 64, True or 'avg'"
        ) from error


def written(name: str, options: Iterable[tuple[str, Any]]) -> str:
    """A name and its options as they are written; the name alone without options."""
    pieces = ", ".join(f"{option}={value!r}" for option, value in options)
    return f"{name}({pieces})" if pieces else name
