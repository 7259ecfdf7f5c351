"""What checks are made of: a measure, how it is judged, and the subject that is measured."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attlas.catalog import registry
from attlas.catalog.kinds import LAYER, MODULE, Kind, kind_of
from attlas.catalog.registry import Reduction
from attlas.supports import Supports

#: Two ways to the same number differ by the order of their sums: 4096 units in the last place.
ULPS = 4096


class Measure(NamedTuple):
    """One look: on which configuration, how far off, and how far is allowed."""

    case: str
    error: float
    bound: float
    reason: str = ""


def same(case: str, ours: Tensor, theirs: Tensor) -> Measure:
    """The same numbers but for the order of sums, in the precision of `theirs`."""
    if ours.shape != theirs.shape:
        return Measure(case, math.inf, 0.0, f"shape {list(ours.shape)} for {list(theirs.shape)}")
    largest = theirs.detach().abs().max().item() if theirs.numel() else 0.0
    bound = ULPS * torch.finfo(theirs.dtype).eps * max(1.0, largest)
    return Measure(case, distance(ours, theirs), bound)


def holds(case: str, is_so: bool, reason: str) -> Measure:
    """What is so or not; `reason` tells what it is not."""
    return Measure(case, 0.0 if is_so else 1.0, 0.0, "" if is_so else reason)


def finite(case: str, *tensors: Tensor | None) -> Measure:
    """No NaN and no Inf in any of the tensors."""
    bad = sum(int((~t.isfinite()).sum()) for t in tensors if t is not None)
    return Measure(case, float(bad), 0.0, f"{bad} values are NaN or Inf" if bad else "")


def distance(a: Tensor, b: Tensor) -> float:
    """Largest |a − b|; infinite where one of them is NaN."""
    if not a.numel():
        return 0.0
    gap = (
        (a.detach().double() - b.detach().double())
        .abs()
        .nan_to_num(nan=torch.inf, posinf=torch.inf)
    )
    return float(gap.max())


def refuses(case: str, call: Callable[[], object], *names: str) -> Measure:
    """The call raises a ValueError whose message names one of the arguments."""
    try:
        call()
    except (ValueError, TypeCheckError) as error:  # the latter where shapes are checked at run time
        told = any(name in str(error) for name in names)
        return holds(case, told, f"the message does not name {' or '.join(names)}: {error}")
    except Exception as error:  # any other exception is what this check is there to find
        return holds(case, False, f"raised {type(error).__name__}, not ValueError: {error}")
    return holds(case, False, "was accepted")


def rows(given: list[Any], chosen: Tensor) -> list[Any]:
    """These rows of what a forward pass takes: a tensor, and lists of tensors."""
    return [
        each[chosen] if isinstance(each, Tensor) else [t[chosen] for t in each] for each in given
    ]


@dataclass(frozen=True)
class Subject:
    """What the contract is held against.

    Args:
        name: under which results are listed.
        object: the class or function.
        kind: its kind.
        example: constructor options of a small instance.
        reduces_to: the declared special case.
        registered: whether the registry knows it.
    """

    name: str
    object: Any
    kind: Kind
    example: Mapping[str, Any]
    reduces_to: Reduction | None = None
    registered: bool = True

    @property
    def expected_failures(self) -> Mapping[str, str]:
        """Check name -> reason, as the object declares."""
        return dict(getattr(self.object, "expected_failures", {}))

    def made(self, **options: object) -> Any:
        """A small instance: the kind's sizes, the object's example, and these options over both."""
        return self.object(**{**self.kind.small, **self.example, **options})

    def layer(
        self, *, noise: float = 0.1, dtype: torch.dtype = torch.float64, **options: object
    ) -> Any:
        """A small layer in evaluation mode, no parameter of it left at a special value."""
        torch.manual_seed(0)
        made = self.made(**options).to(dtype).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += noise * torch.randn_like(parameter)
        return made

    def takes(self, **options: object) -> bool:
        """Whether it can be made with these options; refusing one by its name is allowed."""
        try:
            self.made(**options)
        except ValueError as error:
            if any(name in str(error) for name in options):
                return False
            raise
        return True

    def forms(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """The named option sets that most checks go through."""
        yield "plain", {}
        if self.causal_form:
            yield "causal", {"causal": True}
        if self.kind is LAYER and self.takes(position="rope"):
            yield "rope", {"position": "rope", "causal": self.causal_form}

    def inputs(
        self, made: Any, batch: int = 2, *, tokens: int = 9, dtype: torch.dtype = torch.float64
    ) -> list[Any]:
        """What the forward pass of an instance takes: `tokens`, or a feature map and earlier ones."""
        if self.kind is not MODULE:
            return [torch.randn(batch, tokens, made.dim, dtype=dtype)]
        height, width = made.side(5), made.side(5) + made.multiple
        x = torch.randn(batch, made.channels, height, width, dtype=dtype)
        earlier = [torch.randn(batch, c, height, width, dtype=dtype) for c in made.previous]
        return [x, earlier] if earlier else [x]

    @property
    def causal_options(self) -> dict[str, Any]:
        """Constructor options of the causal form, where there is one."""
        return {"causal": True} if self.causal_form else {}

    @property
    def supports(self) -> Supports | None:
        """What the layer can be asked for; None for what is no layer."""
        return getattr(self.object, "supports", None)

    @property
    def causal_form(self) -> bool:
        """Whether the layer has a causal form."""
        return self.supports is not None and self.supports.causal


Look: TypeAlias = Callable[[Subject], Iterable[Measure]]


@dataclass(frozen=True)
class Check:
    """A named look at subjects of the kinds that sign its family."""

    name: str
    family: str
    look: Look
    applies: Callable[[Subject], bool]
    poisoned: bool


#: Every check, in the order of definition.
CHECKS: list[Check] = []


def check(
    family: str, *, when: Callable[[Subject], bool] = lambda subject: True, poisoned: bool = True
) -> Callable[[Look], Look]:
    """Register a function as a check of all subjects that sign `family`, for which `when` holds.

    Args:
        family: a name that a kind signs: its own, "part" for all that attaches to a model, or "network"
            for every `nn.Module`.
        when: whether the check applies to a subject at all.
        poisoned: whether memory that nothing wrote reads as NaN meanwhile.
    """

    def register(look: Look) -> Look:
        name = look.__name__.strip("_").replace("_", "-")
        CHECKS.append(Check(name, family, look, when, poisoned))
        return look

    return register


def subject_of(thing: Any) -> Subject:
    """The subject that a name, a registered object, an instance or a layer class stands for.

    Raises:
        UnknownName: a name that the registry does not know.
        TypeError: an object that no kind of mechanism describes.
    """
    if isinstance(thing, str):
        return _of_entry(registry.find(thing))
    plain = inspect.isclass(thing) or inspect.isfunction(thing)
    target = thing if plain else type(thing)
    entry = registry.entry_of(target)
    if entry is not None:
        return _of_entry(entry)
    try:
        kind = kind_of(target)
    except TypeError as error:
        raise TypeError(
            f"check takes a registered mechanism, its name, or a class of a kind of attlas; {error}"
        ) from None
    return Subject(target.__name__, target, kind, {}, registered=False)


def _of_entry(entry: registry.Entry) -> Subject:
    return Subject(entry.name, entry.object, entry.kind, entry.example, entry.reduces_to)


class _Poison(TorchFunctionMode):
    """Fills what torch.empty and its kin return with NaN."""

    _makers = frozenset({
        torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty,
        torch.Tensor.new_empty_strided,
    })  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in self._makers and isinstance(out, Tensor) and out.is_floating_point():
            with torch.no_grad():
                out.fill_(torch.nan)
        return out


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory from `torch.empty` reads as NaN inside, so that reading what was never written shows."""
    with _Poison():
        yield
