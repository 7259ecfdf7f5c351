"""Reference vectors: what a published implementation computed, and adapters that hold us to it.

A case is `folder/x.json` (its `config` and `tolerance`) and `folder/x.safetensors`, whose
tensors are named `in.*`, `param.*`, `mid.*` and `out.*`. An adapter, found by the folder's name,
builds our mechanism from the config, maps the published state dict to ours and compares:

    @adapter("sinkformer", mechanism="sinkformer")
    def sinkformer(case):
        layer = ...                                       # from case.config and case.params
        yield case.compare("out.y", layer(case.inputs["x"]))

An adapter reads all that a case tells. A key of its config, an input, a weight or an output that it
passes over fails the case by name; `Case.states` reads what the tensors show or only one value of
which is known, and `Case.without_effect` what changes no number.

Cases and their adapter live in one folder of a checkout: `tests/papers/SLUG/golden/folder/x.json` and
`tests/papers/SLUG/adapters.py`. What adapters share they import from `tests`: `from reference.model
import answered`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from attlas.contract.result import Result
from attlas.contract.told import Told
from attlas.errors import UserError

GROUPS = {"in": "inputs", "param": "params", "mid": "mids", "out": "outs"}


class Check(NamedTuple):
    """One comparison: passed when `error` is at most `bound`."""

    name: str
    error: float
    bound: float


@dataclass
class Case:
    """One case of reference vectors; the tensors are named without their `in.`, `param.` prefix.

    Args:
        name: the folder's name, by which the adapter is found.
        stem: the file's name without its ending.
        meta: the whole json.
        broken: why the tensors could not be read, if they could not.
    """

    name: str
    stem: str
    meta: dict[str, Any]
    inputs: MutableMapping[str, Tensor] = field(default_factory=dict)
    params: MutableMapping[str, Tensor] = field(default_factory=dict)
    mids: MutableMapping[str, Tensor] = field(default_factory=dict)
    outs: MutableMapping[str, Tensor] = field(default_factory=dict)
    broken: str = ""

    def __post_init__(self) -> None:
        self.seen: set[str] = set()
        for group, name in GROUPS.items():
            setattr(self, name, Told(getattr(self, name), group, self.seen))

    @property
    def label(self) -> str:
        """Folder and file, as results name the case."""
        return f"{self.name}/{self.stem}"

    @property
    def config(self) -> Mapping[str, Any]:
        """How the published implementation was configured."""
        return Told(self.meta.get("config", {}), "config", self.seen)

    def states(self, **expected: Any) -> None:
        """Read keys of the config of which one value alone fits, where the config has them.

        Args:
            expected: the value of each; a tuple holds several that mean the same.

        Raises:
            UserError: the config tells another value.
        """
        for key, value in expected.items():
            if key not in self.config:
                continue
            told, fitting = self.config[key], value if isinstance(value, tuple) else (value,)
            if told not in fitting:
                raise UserError(f"config {key!r} is {told!r}; the adapter takes only {value!r}")

    def sizes(self, tensor: Tensor, names: str) -> None:
        """Read keys of the config that tell a tensor's sizes: one for each axis, _ for an axis that
        none tells, say "batch heads length _".

        Raises:
            UserError: the config tells another size.
            ValueError: not one name for each axis.
        """
        told = zip(names.split(), tensor.shape, strict=True)
        self.states(**{name: size for name, size in told if name != "_"})

    def without_effect(self, *names: str) -> None:
        """Read what changes no output, say "param.bias" of a sum that a softmax does not see."""
        self.seen.update(names)

    def unread(self) -> list[str]:
        """What of the config, inputs, weights and outputs nobody has read; intermediates may be."""
        told = (self.config, self.inputs, self.params, self.outs)
        return [name for each in told if isinstance(each, Told) for name in each.unread()]

    @property
    def atol(self) -> float:
        """Absolute tolerance."""
        return float(self.meta.get("tolerance", {}).get("atol", 1e-5))

    @property
    def rtol(self) -> float:
        """Tolerance relative to the published number."""
        return float(self.meta.get("tolerance", {}).get("rtol", 1e-4))

    def compare(self, name: str, ours: Tensor) -> Check:
        """Our tensor against the published one called `name`, say "out.y" or "mid.weights".

        The error is |ours − theirs| at the element with the largest |ours − theirs| / (atol + rtol
        |theirs|), the bound is atol + rtol |theirs| there.
        """
        group, _, rest = name.partition(".")
        return compare(name, ours, getattr(self, GROUPS[group])[rest], self.atol, self.rtol)


def compare(name: str, ours: Tensor, theirs: Tensor, atol: float, rtol: float) -> Check:
    """Ours against theirs; another shape, or a NaN that theirs has not, is an infinite error."""
    if ours.shape != theirs.shape:
        return Check(f"{name}: shape {list(ours.shape)} for {list(theirs.shape)}", math.inf, atol)
    a, b = ours.detach().double().cpu().flatten(), theirs.double().flatten()
    same = (a == b) | (a.isnan() & b.isnan())
    error = (a - b).abs().masked_fill(same, 0.0).nan_to_num(nan=torch.inf, posinf=torch.inf)
    bound = (atol + rtol * b.abs()).nan_to_num(nan=atol, posinf=atol)
    if not len(error):
        return Check(name, 0.0, atol)
    worst = int((error / bound.clamp(min=1e-300)).argmax())
    return Check(name, float(error[worst]), float(bound[worst]))


Adapter: TypeAlias = Callable[[Case], Iterable[Check]]

#: Folder name -> (adapter, the mechanism's name in the registry).
_ADAPTERS: dict[str, tuple[Adapter, str]] = {}


def adapter(*folders: str, mechanism: str) -> Callable[[Adapter], Adapter]:
    """Register a function that runs the cases of these folders through a mechanism of ours.

    Raises:
        ValueError: a folder that another function runs already.
    """

    def register(function: Adapter) -> Adapter:
        for folder in folders:
            taken = _ADAPTERS.get(folder)
            if taken is not None:
                raise ValueError(f"cases {folder!r} have an adapter already, in {taken[0].__module__}")
            _ADAPTERS[folder] = (function, mechanism)
        return function

    return register


def adapters() -> dict[str, tuple[Adapter, str]]:
    """Folder name -> (adapter, mechanism), with those of the checkout's tests; none outside one."""
    _import_checkout()
    return dict(_ADAPTERS)


def checkout() -> Path | None:
    """The root of the checkout that this package runs from, if it does."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "src" / "attlas").is_dir() and (root / "tests").is_dir() else None


@cache
def _import_checkout() -> None:
    root = checkout()
    if root is None:
        return
    tests = root / "tests"
    with _first_on_path(tests):
        for path in sorted(tests.glob("papers/*/adapters.py")):
            name = f"attlas_adapters_{path.parent.name}"
            spec = spec_from_file_location(name, path)
            assert spec is not None
            assert spec.loader is not None
            module = module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    """Modules of `folder` are found by their plain names meanwhile, from wherever the process runs."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def checkout_cases() -> list[Case]:
    """The cases of the checkout that this package runs from; none outside one."""
    root = checkout()
    papers = root / "tests" / "papers" if root else None
    return load_cases(papers) if papers is not None and papers.is_dir() else []


#: Where cases are in a folder: of all papers, of one paper, of all mechanisms, of one mechanism.
PLACES = ("*/golden/*/*.json", "golden/*/*.json", "*/*.json", "*.json")


def load_cases(folder: str | Path) -> list[Case]:
    """Every case under `folder`: NAME/x.json, or SLUG/golden/NAME/x.json as papers keep theirs.

    Raises:
        UserError: no such folder, or no case in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"cases must be a folder of reference cases; {root} is not a folder")
    files = next((found for place in PLACES if (found := sorted(root.glob(place)))), [])
    cases = [_load(path) for path in files]
    if not cases:
        raise UserError(
            f"{root} holds no reference cases: it takes NAME/x.json with NAME/x.safetensors beside"
        )
    return cases


def _load(path: Path) -> Case:
    case = Case(path.parent.resolve().name, path.stem, {})
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(meta, dict) or not isinstance(meta.get("config", {}), dict):
            raise ValueError("it must be an object with a config")
        case.meta = meta
    except (ValueError, OSError) as error:
        case.broken = f"{path.name} cannot be read: {error}"
        return case
    tensors = path.with_suffix(".safetensors")
    try:
        found = load_file(tensors)
    except FileNotFoundError:
        case.broken = f"{tensors.name} is missing beside {path.name}"
    except (SafetensorError, OSError, ValueError) as error:
        case.broken = f"{tensors.name} is damaged: {error}"
    else:
        for key, tensor in found.items():
            group, _, rest = key.partition(".")
            if group in GROUPS:
                getattr(case, GROUPS[group])[rest] = tensor
    return case


def run_case(case: Case) -> list[Result]:
    """Run one case through its adapter; without one a single "no adapter"."""
    known = adapters().get(case.name)
    name = known[1] if known else case.name
    if case.broken:
        return [Result(name, case.label, "read", None, None, "failed", case.broken)]
    if known is None:
        return [Result(name, case.label, "reference", None, None, "no adapter")]
    done: list[Result] = []
    case.seen.clear()
    try:
        with torch.no_grad():
            done.extend(_judged(name, case, known[0](case)))
        if not done:
            raise ValueError("the adapter compared nothing")
        if unread := case.unread():
            raise UserError(f"the adapter of {case.name!r} does not read {', '.join(unread)}")
    except Exception as error:  # whatever an adapter meets is that case's failure, not verify's end
        reason = f"{type(error).__name__}: {error}"
        done.append(Result(name, case.label, "run", None, None, "failed", reason))
    return done


def _judged(name: str, case: Case, checks: Iterable[Check]) -> Iterator[Result]:
    for check in checks:
        fine = check.error <= check.bound
        reason = "" if fine else f"off by {check.error:.3g} where {check.bound:.3g} is allowed"
        yield Result(
            name, case.label, check.name, check.error, check.bound,
            "passed" if fine else "failed", reason,
        )  # fmt: skip


def load_weights(layer: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a layer published weights under our names, in their precision, and stop its dropout.

    Biases of ours that the published layer has not become 0, which is what it computes.

    Raises:
        RuntimeError: another weight is missing, not known, or of another shape.
    """
    # In their precision first: loading would round to what the layer has.
    own = layer.to(next(iter(weights.values())).dtype).eval().state_dict()
    absent = {
        name: torch.zeros_like(own[name]) for name in own
        if name.endswith("bias") and name not in weights
    }  # fmt: skip
    layer.load_state_dict({**absent, **weights})
