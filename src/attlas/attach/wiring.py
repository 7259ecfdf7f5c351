"""How an attachment takes hold of a model, and lets go: registries, configurations and hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attlas.attach import calls, generating, hooks, own, stream, under
from attlas.attach.capturing import Capturing
from attlas.attach.forward import attention
from attlas.attach.state import ATTACHED, Attachment
from attlas.errors import UserError
from attlas.hf import interface

#: The name under which attlas stands in Transformers' registries while a model is attached.
NAME = "attlas"


def connect(held: Attachment, capturing: Capturing) -> None:
    """Intercept the model.

    Raises:
        ValueError: the model is attached already or cannot be intercepted.
    """
    tower = held.tower
    if any(module in ATTACHED for module in tower.layers):
        raise UserError(
            f"this {type(tower.model).__name__} is attached already, or generates in another thread; "
            "give all parts to one attach(), and wait for what is generated without it"
        )
    ours = own.own_layers(tower.module)
    held.own = bool(ours)
    _resolve(held)
    own.check(ours, held.parts)
    capturing.check()
    held.undo = [lambda: _forget(held)]
    try:
        function = torch.compiler.disable(attention, reason=hooks.REASON)
        interface.register(NAME, function, no_mask=under.no_mask)
        for module in tower.layers:
            ATTACHED[module] = held
        held.undo += _open(ours) if ours else _switch(held)
        held.undo += [] if ours or held.plain else under.watch(held)
        held.undo += capturing.hook()
        held.captures = capturing.active
        held.undo += generating.watch(held)
        held.undo += calls.hook(held)
        held.undo += stream.watch(held)
        if any(part.wants_hidden for part in held.parts):
            held.undo += _watch_hidden(held)
    except BaseException:
        disconnect(held)
        raise


def disconnect(held: Attachment) -> None:
    """Undo all that `connect` did."""
    while held.undo:
        held.undo.pop()()


def _resolve(held: Attachment) -> None:
    """Numbers of layers and heads, of this model."""
    sides = {"decoder": True} if held.tower.keeps or held.own else {"encoder": True}
    tower: Any = held.tower.module
    config = tower.config.get_text_config(**sides)
    layers = getattr(config, "num_hidden_layers", None)
    heads = getattr(config, "num_attention_heads", None)
    for part in held.parts:
        if part.where.given:
            part.where.resolve(int(layers or 0), int(heads or 0), type(part).__name__)


def _open(layers: list[Any]) -> list[Any]:
    """A door before each layer of ours."""
    for layer in layers:
        layer.door = own.Door(layer)

    def close() -> None:
        for layer in layers:
            layer.door = None

    return [close]


def _forget(held: Attachment) -> None:
    for module in held.tower.layers:
        ATTACHED.pop(module, None)
    if not ATTACHED:
        interface.forget(NAME)


def _switch(held: Attachment) -> list[Callable[[], Any]]:
    """Name our attention in the configurations of the tower and of what stands around it alone.

    What stands around it makes masks for it. Towers beside it keep the attention that they have.
    """
    tower: Any = held.tower.module
    around = [model.config for model in held.tower.outer]
    configs = {id(config): config for config in (*interface.configurations(tower), *around)}
    before = [(config, interface.implementation(config)) for config in configs.values()]
    own = [tower, *held.tower.outer, *held.tower.layers]
    meant = {id(getattr(module, "config", None)) for module in own}

    def restore() -> None:
        for config, name in before:
            interface.restore(config, name)

    try:
        tower.set_attn_implementation(NAME)
        if interface.implementation(tower.config) != NAME:
            raise UserError(
                f"the attention of {type(tower).__name__} cannot be intercepted: its code does not "
                "call Transformers' AttentionInterface"
            )
    except BaseException:
        restore()
        raise
    for config, name in before:
        chosen = interface.Attached(NAME, name) if id(config) in meant else name
        interface.restore(config, chosen)
    return [restore]


def _watch_hidden(held: Attachment) -> list[Any]:
    """Hooks that show a layer's attention what its module was given, of one module at a time."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = kwargs.get("hidden_states", args[0] if args else None)
        if held.forward_pass is not None and isinstance(states, Tensor):
            held.forward_pass.hidden = {module: states}

    layers = (m for m in held.tower.layers if isinstance(getattr(m, "layer_idx", None), int))
    return [hooks.before(m, before) for m in layers]
