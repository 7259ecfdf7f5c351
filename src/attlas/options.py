"""Options, said once: in the body of a class, with their type, default and one line of meaning.

    class SoftCap(Attention):
        cap: float = option("largest logit", default=50.0, above=0)

That is the constructor's parameter, its check, the attribute, what `help()` and `attlas show` print,
and what an editor completes. Subclasses inherit it; one that declares it again gives it another default
or meaning in the same place. When all options are set the constructor calls `setup`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar, TypeVar, dataclass_transform, overload

from attlas import former as former_names
from attlas.errors import UserError
from attlas.hints import fits, told, tuples, type_of, words

T = TypeVar("T")
#: Stands for no default, where None could be one.
_NOTHING: Any = object()


class BadOption(UserError, TypeError):
    """An option that is unknown, missing, or of the wrong type."""


@dataclass(eq=False)
class Option:
    """One option of a class, see `option`.

    Attributes:
        meaning: one line.
        default: its value unless given; the parameter is required without one.
        factory: what the value is worked out with unless given, once plain options are set.
        kw_only: whether it is given by name alone.
        limits: bounds by the words of the message that refuses what lies outside.
        former: a name that it once had, which is taken for it with a warning.
        parameter: the constructor's name for it.
        attribute: the object's name for it.
        type: its annotation, as written.
        module: in which the annotation is understood.
    """

    meaning: str
    default: Any
    factory: Callable[[Any], Any] | None
    kw_only: bool
    limits: Mapping[str, float]
    former: str
    parameter: str
    attribute: str = ""
    type: str = ""
    module: str = ""

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is _NOTHING and self.factory is None

    @property
    def annotation(self) -> str:
        """Its type as a caller may give it: None asks for a default that is worked out."""
        return self._or_none(self.type)

    @property
    def told(self) -> str:
        """Its type, as `annotation`, with the names of types told apart."""
        return self._or_none(told(type_of(self.type, self.module)))

    def _or_none(self, text: str) -> str:
        return f"{text} | None" if self.factory and "None" not in text else text

    @property
    def as_parameter(self) -> inspect.Parameter:
        """It, in a signature."""
        kind = (
            inspect.Parameter.KEYWORD_ONLY
            if self.kw_only
            else inspect.Parameter.POSITIONAL_OR_KEYWORD
        )
        default = (
            None if self.factory else inspect.Parameter.empty if self.required else self.default
        )
        return inspect.Parameter(self.parameter, kind, default=default, annotation=self.annotation)

    def checked(self, value: object) -> Any:
        """The value, if it is of the type and within the bounds; a list for a tuple is made one.

        Raises:
            BadOption: it is of another type.
            ValueError: it lies outside the bounds, or is none of the words that it may be.
        """
        hint = type_of(self.type, self.module)
        value = tuples(value) if "tuple[" in self.type else value
        if not fits(value, hint):
            if type(value) in map(type, words(hint)):
                raise _another_word(self.parameter, value, words(hint))
            raise BadOption(f"{self.parameter} takes {told(hint)}, got {value!r}")
        for number in value if isinstance(value, tuple | list) else (value,):
            outside = _outside(number, self.limits)
            if outside:
                raise UserError(f"{self.parameter} must be {outside}, got {value!r}")
        return value


@overload
def option(
    meaning: str, *, kw_only: bool = ..., alias: str = ..., former: str = ..., at_least: float = ...,
    above: float = ..., at_most: float = ..., below: float = ...,
) -> Any: ...  # fmt: skip
@overload
def option(
    meaning: str, *, default: T, kw_only: bool = ..., alias: str = ..., former: str = ...,
    at_least: float = ..., above: float = ..., at_most: float = ..., below: float = ...,
) -> T: ...  # fmt: skip
@overload
def option(
    meaning: str, *, factory: Callable[[Any], T], kw_only: bool = ..., alias: str = ...,
    former: str = ..., at_least: float = ..., above: float = ..., at_most: float = ...,
    below: float = ...,
) -> T: ...  # fmt: skip
def option(
    meaning: str, *, default: Any = _NOTHING, factory: Callable[[Any], Any] | None = None,
    kw_only: bool = True, alias: str = "", former: str = "", **limits: float,
) -> Any:  # fmt: skip
    """Declare an option: `window: int = option("newest tokens kept", default=64, at_least=1)`.

    Args:
        meaning: one line, for `help()` and `attlas show`.
        default: the value unless given; without default and factory the option is required.
        factory: takes the object and gives the value unless one is given, or None is.
            What was given and plain defaults are set by then, and the factories declared before.
        kw_only: False for one that may be given by place.
        alias: the constructor's name for it, where a method of the class has that name.
        former: a name that it once had; it is taken, with a warning that tells the present one.
        limits: `at_least`, `above`, `at_most`, `below`: bounds of a number, or of each of several.
    """
    unknown = set(limits) - set(_LIMITS)
    if unknown:
        raise TypeError(f"option takes the limits {sorted(_LIMITS)}, got {sorted(unknown)[0]!r}")
    return Option(meaning, default, factory, kw_only, limits, former, alias)


@dataclass_transform(kw_only_default=True, field_specifiers=(option,))
class Configured:
    """What is made with options: declared with `option`, and set before `setup` is called."""

    #: Every option by its parameter, inherited ones first.
    declared_options: ClassVar[Mapping[str, Option]] = {}
    #: Inherited options that would mean nothing here: they have their defaults, and nobody is asked.
    without: ClassVar[tuple[str, ...]] = ()
    #: Those options.
    closed_options: ClassVar[Mapping[str, Option]] = {}

    def __init_subclass__(cls, **rest: object) -> None:
        super().__init_subclass__(**rest)
        former_names.refuse_members(cls)
        found: dict[str, Option] = {}
        closed: dict[str, Option] = {}
        for base in reversed(cls.__mro__[1:]):
            found |= vars(base).get("declared_options", {})
            closed |= vars(base).get("closed_options", {})
        found |= _own_options(cls)
        closed |= {name: found[name] for name in vars(cls).get("without", ())}
        cls.closed_options = closed
        cls.declared_options = found = {n: o for n, o in found.items() if n not in closed}
        ordered = sorted(found.values(), key=lambda o: o.kw_only)
        own = [o.as_parameter for o in ordered]
        if cls.__init__ is not Configured.__init__:  # a constructor of its own
            own = list(inspect.signature(cls.__init__).parameters.values())[1:]
        else:
            _tell(cls, ordered)
        cls.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]

    def __init__(self, *given: object, **named: object) -> None:
        values = _bound(type(self), type(self).declared_options, given, named)
        options = {**type(self).declared_options, **type(self).closed_options}
        super().__init__()
        later = [n for n, one in options.items() if one.factory and values.get(n) is None]
        for name in sorted(options, key=lambda name: name in later):
            one = options[name]
            if one.factory and name in later:
                value = one.factory(self)
            elif name in values:
                value = one.checked(values[name])
            else:
                value = one.default
            # An option is what was asked for: a module among them is registered by `setup` alone.
            object.__setattr__(self, one.attribute, value)
        self.setup()

    def setup(self) -> None:
        """Called when all options are set; checks how they go together and makes what they ask for."""

    @property
    def options(self) -> dict[str, Any]:
        """The value of every option, by its parameter."""
        return {n: getattr(self, o.attribute) for n, o in type(self).declared_options.items()}


def _own_options(cls: type) -> dict[str, Option]:
    """The options that a class body declares, which then leave it: an object has values instead."""
    found: dict[str, Option] = {}
    for name, annotation in vars(cls).get("__annotations__", {}).items():
        value = vars(cls).get(name)
        text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        if isinstance(value, Option):
            value.attribute, value.parameter = name, value.parameter or name
            value.type, value.module = text, cls.__module__
            found[value.parameter] = value
            delattr(cls, name)
        elif name in vars(cls) and "ClassVar" not in text:
            raise TypeError(
                f"{cls.__name__}.{name}: an option is declared with option('its meaning', "
                f"default={value!r}), and what is no option is a ClassVar[{text}]"
            )
    bare = [n for n, v in vars(cls).items() if isinstance(v, Option)]
    if bare:
        raise TypeError(
            f"{cls.__name__}.{bare[0]}: an option needs a type, {bare[0]}: int = option(...)"
        )
    return found


def _tell(cls: type, options: list[Option]) -> None:
    """Put the meanings into the docstring, where `help()` finds them."""
    own = vars(cls).get("__doc__") or ""
    if options and "Args:\n" not in own:
        meanings = "\n".join(f"        {o.parameter}: {o.meaning}." for o in options)
        head, raises, tail = own.rstrip().partition("\n\n    Raises:\n")
        cls.__doc__ = f"{head}\n\n    Args:\n{meanings}{raises}{tail}\n"


def _bound(
    cls: type, options: Mapping[str, Option], given: tuple[object, ...], named: Mapping[str, object]
) -> dict[str, object]:
    """What was given, by parameter.

    Raises:
        BadOption: too many values, one given twice, an unknown or a missing option.
    """
    places = [name for name, one in options.items() if not one.kw_only]
    if len(given) > len(places):
        raise BadOption(
            f"{cls.__name__} takes {len(places)} options by place {places}, got {len(given)}; "
            "the others are given by name"
        )
    values = dict(zip(places, given, strict=False))
    twice = sorted(set(values) & set(named))
    if twice:
        raise BadOption(f"{cls.__name__} got {twice[0]} twice, by place and by name")
    values |= by_present_names(cls.__name__, named, options)
    missing = [name for name, one in options.items() if one.required and name not in values]
    if missing:
        raise BadOption(f"{cls.__name__} needs the option {missing[0]!r}")
    return values


def by_present_names(
    whose: str, given: Mapping[str, Any], known: Mapping[str, object]
) -> dict[str, Any]:
    """What was given, an option of a former name under its present one, with a warning.

    Args:
        whose: options they are, as the messages say it.
        given: values by name.
        known: what is taken, by name: an `Option`, where it is declared as one.

    Raises:
        BadOption: an unknown option, with the nearest that is known.
    """
    renamed = {o.former: n for n, o in known.items() if isinstance(o, Option) and o.former}
    found = {}
    for name, value in given.items():
        present = renamed.get(name, name)
        if present not in known or (present != name and present in given):
            near = [present] if present in known else get_close_matches(name, known, n=2)
            told_near = f"did you mean {' or '.join(map(repr, near))}?"
            hint = told_near if near else f"it takes {list(known)}"
            raise BadOption(f"{whose} takes no option {name!r}; {hint}")
        if present != name:
            former_names.tell(f"the option {name!r} of {whose}", present)
        found[present] = value
    return found


# What a value may be ---------------------------------------------------------------------------------

#: Limits by the word that declares them: how it is told, and what breaks it.
_LIMITS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "at_least": ("at least", lambda value, limit: value >= limit),
    "above": ("above", lambda value, limit: value > limit),
    "at_most": ("at most", lambda value, limit: value <= limit),
    "below": ("below", lambda value, limit: value < limit),
}


def _outside(value: object, limits: Mapping[str, float]) -> str:
    """How limits that a number breaks are told; empty where it breaks none, or is no number."""
    if not isinstance(value, int | float) or all(
        _LIMITS[n][1](value, v) for n, v in limits.items()
    ):
        return ""
    return " and ".join(f"{_LIMITS[name][0]} {limit:g}" for name, limit in limits.items())


def _another_word(name: str, value: object, known: list[object]) -> UserError:
    """The error that says which words there are, and which was probably meant."""
    near = get_close_matches(str(value), [word for word in known if isinstance(word, str)], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return UserError(f"{name} must be {' or '.join(map(repr, known))}, got {value!r}{hint}")
