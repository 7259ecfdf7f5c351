"""What is under way in one thread: a forward call, and which layer each attention in it belongs to.

A module may be one for several layers (ALBERT, Zamba2): its calls are counted, unless it is told the
layer. What is computed again for gradients (checkpointing) has the numbers of the first time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from attlas.attach import hooks
from attlas.attach.call import ForwardPass
from attlas.attach.towers import Tower, is_attention
from attlas.errors import UserError
from attlas.tracing import HOLDING

#: The forward call of an attached tower that is under way here, in which masks are made.
PASS: ContextVar[ForwardPass | None] = ContextVar("PASS", default=None)
#: Arguments that bring attention something else than its own tokens to attend to.
CROSS = ("key_value_states", "encoder_hidden_states", "cross_attention_states")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def recording() -> bool:
    """Whether a step is recorded now, which parts are told of behind it, and no masks are made for."""
    return HOLDING.get() is not None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def no_mask(causal: tuple[int, int] | None) -> bool:
    """Whether attention needs no mask: of a recorded step, or of new tokens that see all before them.

    Args:
        causal: (tokens before the queries, queries), where the mask would say no more.
    """
    if recording():
        return True
    forward_pass = PASS.get()
    if forward_pass is None or not forward_pass.offset:
        return False
    return (forward_pass.offset, forward_pass.length) == causal


@dataclass(slots=True)
class Entered:
    """A call of an attention module.

    Attributes:
        told: the layer's number, where the module is given it with each call.
        aside: the module attends to something else than the model's own tokens.
        number: the layer's number, once the module has attended.
    """

    told: int | None = None
    aside: bool = False
    number: int | None = None


@dataclass(slots=True)
class Under:
    """A forward call of an attached model.

    Attributes:
        forward_pass: what parts are told of it.
        direct: nothing of ours is needed: no part, and a cache that Transformers can read.
        before: the call that this one is made in, of another tower.
        again: a part of the call is computed a second time, by checkpointing.
        modules: the module that has attended for each layer.
        entered: the newest call of each attention module.
    """

    forward_pass: ForwardPass
    direct: bool = False
    before: ForwardPass | None = None
    again: bool = False
    modules: dict[int, nn.Module] = field(default_factory=dict)
    entered: dict[nn.Module, Entered] = field(default_factory=dict)

    def repeated(self) -> Under:
        """The call as it stands, for what is computed a second time from here on."""
        return replace(self, again=True, modules=dict(self.modules), entered={})

    def number(self, module: nn.Module, tower: Tower) -> int | None:
        """The layer that a module attends for; None for one that is none of the tower's layers.

        Raises:
            ValueError: a module that attends twice in one call, or for a layer that has attended.
        """
        entry = self.entered.setdefault(module, Entered())
        if entry.aside or module in tower.aside:
            return None
        if entry.number is not None:
            raise UserError(
                f"{type(module).__name__} attends in several pieces (layer {entry.number}), which parts "
                "cannot follow; give one picture or sequence a call"
            )
        known = tower.layers[module]
        if module in tower.unsure or self.modules.get(known) is module:
            known = len(self.modules)
        number = known if entry.told is None else entry.told
        other = self.modules.get(number)
        if other is not None:
            raise UserError(
                f"two modules attend for layer {number} of {type(tower.module).__name__}: "
                f"{type(other).__name__} and {type(module).__name__}, which parts cannot tell apart"
            )
        entry.number, self.modules[number] = number, module
        return number


def watch(held: Any) -> list[Callable[[], Any]]:
    """Hooks that tell of each call of an attention module."""
    tower: Tower = held.tower
    return [
        hooks.before(module, _entering(held, module))
        for module in tower.layers
        if is_attention(module) and module not in tower.aside
    ]


def _entering(held: Any, module: nn.Module) -> Callable[..., None]:
    names = list(inspect.signature(module.forward).parameters)

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        under: Under | None = held.under
        if under is not None:
            arguments = dict(zip(names, args, strict=False)) | kwargs
            told = arguments.get("layer_idx")
            aside = any(arguments.get(name) is not None for name in CROSS)
            under.entered[module] = Entered(told if isinstance(told, int) else None, aside)

    return enter
