"""Studies by name: those of the registry, and the claims that mechanisms' own files make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attlas.catalog import registry
from attlas.catalog.kinds import STUDY
from attlas.catalog.source import path_of
from attlas.compare.methods import parse_call, split, written
from attlas.errors import UnknownName, UserError
from attlas.kinds.claim import Claim
from attlas.kinds.study import Study
from attlas.options import by_present_names

#: Words that stand for all claims and for all registered studies.
CLAIMS, STUDIES = "claims", "studies"
#: Options of a claim that a user may change: sizes of the training, not what is claimed.
_SIZES = ("steps", "batch", "dim", "layers", "heads", "seeds")


@dataclass(frozen=True)
class Named:
    """A study as it is asked for.

    Attributes:
        label: its name, with the options that were given.
        study: itself, with these options.
        about: the mechanism or paper whose claim it tries.
    """

    label: str
    study: Study
    about: str


def claims() -> dict[str, Claim]:
    """The claims that mechanisms declare, by name.

    Raises:
        UserError: two of one name.
    """
    found: dict[str, Claim] = {}
    for entry in registry.entries():
        for claim in vars(entry.object).get("claims", ()) if _declares(entry) else ():
            whole = Claim(**{**claim.options, "ours": claim.ours or entry.name})
            if whole.name in found:
                raise UserError(f"two claims are called {whole.name!r}; tell them apart by `also=`")
            found[whole.name] = whole
    return found


def _declares(entry: registry.Entry) -> bool:
    """Whether its file may declare claims: the package's files are read before they are imported."""
    if entry.module.partition(".")[0] != "attlas":
        return hasattr(entry.object, "__dict__")
    path = path_of(entry.module)
    return path is not None and "\n    claims = (" in path.read_text(encoding="utf-8")


def studies() -> dict[str, Study]:
    """The registered studies at their real sizes, by name."""
    return {entry.name: registry.make(entry.name) for entry in registry.entries(STUDY)}


def chosen(texts: list[str], **common: Any) -> list[Named]:
    """The studies that are asked for, each once; `common` options are given to all.

    Raises:
        UserError: nothing is asked for, a name is not known, or an option not taken.
    """
    asked = [piece for text in texts for piece in split(text)]
    if not asked:
        raise UserError(
            "study takes a name, 'claims' for all claims of mechanisms or 'studies' for all others; "
            "`attlas study --list` shows the names"
        )
    known = claims()
    every = {CLAIMS: known, STUDIES: [entry.name for entry in registry.entries(STUDY)]}
    names = [name for piece in asked for name in every.get(piece.strip(), [piece])]
    found = {one.label: one for one in (_made(name, known, common) for name in names)}
    return list(found.values())


def _made(text: str, known: dict[str, Claim], common: dict[str, Any]) -> Named:
    name, options = parse_call("study", text)
    key = name.strip().lower().replace("_", "-")
    registered = {n: e for e in registry.entries(STUDY) for n in e.names}
    if key in registered:
        cls: Any = registered[key].object
        name, taken = registered[key].name, cls.declared_options
    elif key in known:
        name, taken = key, dict.fromkeys(_SIZES)
    else:
        raise UnknownName("study", name, {*registered, *known, CLAIMS, STUDIES})
    options = by_present_names(f"study {name}", options, taken)
    given = {option: options[option] for option in taken if option in options}
    try:
        if key in registered:
            made: Study = registry.make(name, **{**common, **given})
            about = registered[key].paper or name
        else:
            made = Claim(**{**known[key].options, **common, **given})
            about = known[key].ours.partition("(")[0]
    except ValueError as error:
        raise UserError(f"study {name}: {error}") from error
    return Named(written(name, tuple(given.items())), made, about)


def options_of(study: Study) -> str:
    """The options that may be given, with their values."""
    taken = _SIZES if isinstance(study, Claim) else tuple(study.options)
    return ", ".join(f"{name}={getattr(study, name)!r}" for name in taken if name != "device")
