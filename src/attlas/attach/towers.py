"""Which part of a model is attached to: the innermost model that holds the attention asked about.

A model that reads images, or a wrapper around one, holds several models, each with layers 0, 1, 2, ...
of its own. The one that reads tokens and keeps a cache is found by itself, whatever stands around it:
`generate`, a model with pictures, PEFT, `torch.compile`. Of several such a user has to choose.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from attlas.attention import Attention
from attlas.errors import UserError
from attlas.hf.caches import NAMES
from attlas.hf.interface import PreTrainedModel

#: Arguments by which a model is given tokens.
READS = ("input_ids", "inputs_embeds")
_ATTENTION = re.compile("[Aa]ttention|[Aa]ttn|MLA")
#: Modules that attend to something else than the tokens of their own model.
_CROSS = re.compile("[Cc]ross|encoder_attn|EncDec")


@dataclass(frozen=True)
class Tower:
    """What is attached to.

    Attributes:
        model: the Transformers model, without what wraps it; or the tower alone, where the model has
            others besides.
        module: the tower, whose calls are listened to.
        outer: the models around it, the outermost first.
        layers: the number of each module's layer, as its name says.
        unsure: attention modules that share their number with another of their kind.
        aside: attention modules in the tower that are no layer of its: they attend to something else.
    """

    model: nn.Module
    module: nn.Module
    outer: tuple[PreTrainedModel, ...]
    layers: dict[nn.Module, int]
    unsure: frozenset[nn.Module]
    aside: frozenset[nn.Module]

    @property
    def keeps(self) -> bool:
        """Whether it takes a cache."""
        return takes(self.module, NAMES)


#: The tower of modules that belong to no session.
NOWHERE = Tower(nn.Identity(), nn.Identity(), (), {}, frozenset(), frozenset())


def unwrapped(given: Any) -> PreTrainedModel:
    """The Transformers model inside of what wraps it (PEFT, `torch.compile`, data parallelism).

    Raises:
        TypeError: no Transformers model.
        ValueError: several of them side by side.
    """
    queue: list[Any] = [given]
    found: list[PreTrainedModel] = []
    while queue:
        module = queue.pop(0)
        if isinstance(module, PreTrainedModel):
            found += [module] if module not in found else []
        elif isinstance(module, nn.Module):
            queue += module.children()
    if not found:
        raise TypeError(
            f"attach takes a Transformers model, got {type(given).__name__}; "
            "attlas.load(name) gives one"
        )
    if len(found) > 1:
        raise UserError(
            f"{type(given).__name__} holds several models ({_names(given, found)}); attach to one of them"
        )
    return found[0]


def choose(model: PreTrainedModel, parts: tuple[Any, ...]) -> Tower:
    """The tower of a model that is attached to.

    Raises:
        ValueError: parts, on a model without attention or with several towers of equal right.
    """
    if any(isinstance(module, Attention) for module in model.modules()):
        return _tower(model, _base(model), alone=True)  # ours: `own` says which layers are meant
    owners = _owners(model)
    found = list(dict.fromkeys(owners.values()))
    readers = [tower for tower in found if takes(tower, READS)]
    if getattr(model.config, "is_encoder_decoder", False) and len(readers) > 1:
        chosen = found
    else:
        chosen = _innermost([tower for tower in readers if takes(tower, NAMES)]) or found
    if len(chosen) == 1:
        return _tower(model, chosen[0], alone=len(found) == 1)
    if parts and not found:
        raise UserError(
            f"{type(model).__name__} has no attention, so that its parts would never be called"
        )
    if parts:
        both = getattr(model.config, "is_encoder_decoder", False)
        raise UserError(
            f"{type(model).__name__} {'is an encoder-decoder, which ' if both else ''}has several towers "
            f"whose layers have the same numbers ({_names(model, chosen)}); attach to one of them, "
            f"attach(model.{_name(model, chosen[0])}, ...), and call the whole model as before"
        )
    return _tower(model, _base(model), alone=True)


def takes(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether a module's call has an argument of one of these names."""
    return not set(names).isdisjoint(inspect.signature(module.forward).parameters)


def is_attention(module: nn.Module) -> bool:
    """Whether a module of Transformers is, or holds, attention; their classes are named so."""
    return _ATTENTION.search(type(module).__name__) is not None


def _base(model: PreTrainedModel) -> PreTrainedModel:
    base: Any = model.base_model
    return base if isinstance(base, PreTrainedModel) else model


def _owners(model: PreTrainedModel) -> dict[nn.Module, PreTrainedModel]:
    """The innermost model around each attention module."""
    found: dict[nn.Module, PreTrainedModel] = {}

    def walk(module: nn.Module, owner: PreTrainedModel) -> None:
        owner = module if isinstance(module, PreTrainedModel) else owner
        if is_attention(module) and module is not owner:
            found.setdefault(module, owner)
        for child in module.children():
            walk(child, owner)

    walk(model, model)
    return found


def _innermost(towers: list[PreTrainedModel]) -> list[PreTrainedModel]:
    """Those that hold none of the others."""
    return [
        tower for tower in towers
        if not any(other is not tower and other in set(tower.modules()) for other in towers)
    ]  # fmt: skip


def _tower(model: PreTrainedModel, module: PreTrainedModel, alone: bool) -> Tower:
    """A tower, with the numbers of its layers.

    In one that keeps a cache a layer's number is its place there, so that attention without
    `layer_idx` (to pictures, say) is none of its layers.
    """
    owners = _owners(module)
    own = {m: name for name, m in module.named_modules() if owners.get(m, module) is module}
    attention = [m for m in own if is_attention(m)]
    numbered = takes(module, NAMES) and any(_index(m) is not None for m in attention)
    aside = {
        m for m in attention
        if (numbered and _index(m) is None and not takes(m, ("layer_idx",)) and not _holds_index(m))
        or _CROSS.search(f"{own[m]} {type(m).__name__}")
    }  # fmt: skip
    layers = {m: _number(m, name) for m, name in own.items()}
    kinds = {m: (type(m), layers[m]) for m in attention if m not in aside and _index(m) is None}
    often = Counter(kinds.values())
    return Tower(
        model=model if alone else module,
        module=module,
        outer=tuple(
            m for m in model.modules()
            if isinstance(m, PreTrainedModel) and m is not module and module in set(m.modules())
        ),
        layers=layers,
        unsure=frozenset(m for m, kind in kinds.items() if often[kind] > 1),
        aside=frozenset(aside),
    )  # fmt: skip


def _index(module: nn.Module) -> int | None:
    number = getattr(module, "layer_idx", None)
    return number if isinstance(number, int) else None


def _holds_index(module: nn.Module) -> bool:
    """Whether attention inside of a module has a number."""
    return any(is_attention(m) and _index(m) is not None for m in module.modules())


def _number(module: nn.Module, name: str) -> int:
    """`layer_idx`, else the last integer of the module's qualified name, else 0."""
    if (number := _index(module)) is not None:
        return number
    digits = [int(piece) for piece in name.split(".") if piece.isdigit()]
    return digits[-1] if digits else 0


def _name(model: nn.Module, part: nn.Module) -> str:
    return next((name for name, m in model.named_modules() if m is part and name), "")


def _names(model: nn.Module, parts: list[PreTrainedModel]) -> str:
    return ", ".join(_listed(model, parts))


def _listed(model: nn.Module, parts: list[PreTrainedModel]) -> Iterator[str]:
    for part in parts:
        yield f"{_name(model, part)}: {type(part).__name__}"
