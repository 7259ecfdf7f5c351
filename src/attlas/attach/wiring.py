"""How an attachment takes hold of a model, and lets go: registries, configurations and hooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from attlas.attach import calls, generating, own, stream
from attlas.attach.forward import attention
from attlas.attach.state import ATTACHED, Attachment
from attlas.errors import UserError
from attlas.hf import interface

#: The name under which attlas stands in Transformers' registries while a model is attached.
NAME = "attlas"


def connect(held: Attachment) -> None:
    """Intercept the model.

    Raises:
        ValueError: the model is attached already or cannot be intercepted.
    """
    model = held.model
    if any(module in ATTACHED for module in model.modules()):
        raise UserError(
            f"this {type(model).__name__} is attached already; give all parts to one attach()"
        )
    ours = own.own_layers(model)
    if held.parts and getattr(model.config, "is_encoder_decoder", False) and not ours:
        raise UserError(
            f"attach takes no parts on encoder-decoder models such as {type(model).__name__}; "
            "attach to its encoder or decoder alone"
        )
    _resolve(held)
    own.check(ours, held.parts)
    before = [(config, interface.implementation(config)) for config in _configs(model)]
    held.undo = [lambda: _forget(held), lambda: _restore(before)]
    try:
        interface.register(NAME, attention)
        for name, module in model.named_modules():
            ATTACHED[module] = held
            held.layers[module] = _layer_number(module, name)
        if ours:
            held.undo += _open(ours)
        else:
            _switch(model)
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
    config: Any = held.model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
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
    for module in held.layers:
        del ATTACHED[module]
    held.layers.clear()
    if not ATTACHED:
        interface.forget(NAME)


def _restore(implementations: list[tuple[Any, Any]]) -> None:
    for config, implementation in implementations:
        interface.restore(config, implementation)


def _switch(model: Any) -> None:
    model.set_attn_implementation(NAME)
    config = model.config.get_text_config(decoder=True)
    if interface.implementation(config) != NAME:
        raise UserError(
            f"the attention of {type(model).__name__} cannot be intercepted: its code does not "
            "call Transformers' AttentionInterface"
        )


def _configs(model: nn.Module) -> Iterator[Any]:
    """Every configuration of the model and its parts, parents before children.

    Setting a parent's implementation sets its children's too, so children come later.
    """
    seen: set[int] = set()
    queue = [m.config for m in model.modules() if isinstance(m, interface.PreTrainedModel)]
    while queue:
        config = queue.pop(0)
        if id(config) in seen:
            continue
        seen.add(id(config))
        children = [getattr(config, name, None) for name in config.sub_configs]
        queue += [child for child in children if child is not None]
        yield config


def _layer_number(module: nn.Module, name: str) -> int:
    """`layer_idx`, else the last integer of the module's qualified name, else 0."""
    number = getattr(module, "layer_idx", None)
    if isinstance(number, int):
        return number
    digits = [int(piece) for piece in name.split(".") if piece.isdigit()]
    return digits[-1] if digits else 0


def _watch_hidden(held: Attachment) -> list[Any]:
    """Hooks that show a layer's attention what its module was given, of one module at a time."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = kwargs.get("hidden_states", args[0] if args else None)
        if held.forward_pass is not None and isinstance(states, Tensor):
            held.forward_pass.hidden = {module: states}

    layers = (m for m in held.layers if isinstance(getattr(m, "layer_idx", None), int))
    return [m.register_forward_pre_hook(before, with_kwargs=True).remove for m in layers]
