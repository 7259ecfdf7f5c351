"""How a session takes hold of a model, and lets go: registries, configurations and hooks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from attlas.attach.call import Step
from attlas.attach.forward import SESSIONS, attention
from attlas.attach.session import NAME, Session
from attlas.errors import UserError
from attlas.hf import interface
from attlas.hf.caches import Cache, DynamicCache, cache_in, cache_of, fresh_layers


def connect(session: Session) -> None:
    """Intercept the session's model.

    Raises:
        ValueError: the model is attached already or cannot be intercepted.
    """
    model = session.model
    if any(module in SESSIONS for module in model.modules()):
        raise UserError(
            f"this {type(model).__name__} is attached already; give all parts to one attach()"
        )
    if session.parts and getattr(model.config, "is_encoder_decoder", False):
        raise UserError(
            f"attach takes no parts on encoder-decoder models such as {type(model).__name__}; "
            "attach to its encoder or decoder alone"
        )
    before = [(config, interface.implementation(config)) for config in _configs(model)]
    session.undo = [lambda: _forget(session), lambda: _restore(before)]
    try:
        interface.register(NAME, attention)
        for name, module in model.named_modules():
            SESSIONS[module] = session
            session.layers[module] = _layer_number(module, name)
        _switch(model)
        session.undo += _hook(session)
        if any(part.wants_hidden for part in session.parts):
            session.undo += _watch_hidden(session)
    except BaseException:
        disconnect(session)
        raise


def disconnect(session: Session) -> None:
    """Undo all that `connect` did."""
    while session.undo:
        session.undo.pop()()


def _forget(session: Session) -> None:
    for module in session.layers:
        del SESSIONS[module]
    session.layers.clear()
    if not SESSIONS:
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


def _hook(session: Session) -> list[Any]:
    """Hooks on the base model, which runs whether the user calls it or the model around it."""
    base = session.model.base_model
    assert isinstance(base, nn.Module)
    names = [name for name in inspect.signature(base.forward).parameters if name != "self"]

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        if arguments.get("output_attentions") or getattr(base.config, "output_attentions", False):
            raise UserError(
                "attach cannot honour output_attentions: it would hold a length x length matrix "
                "for each layer; use record=['weights']"
            )
        name, given = cache_in(arguments, type(base))
        cache = _owned(session, given, arguments) if session.keepers else given
        session.before(_step(session, cache, arguments))
        return None if cache is given else ((), arguments | {name: cache})

    def after(_: nn.Module, __: Any, output: Any) -> None:
        session.after(cache_of(output))

    return [
        base.register_forward_pre_hook(before, with_kwargs=True).remove,
        base.register_forward_hook(after, always_call=True).remove,
    ]


def _watch_hidden(session: Session) -> list[Any]:
    """Hooks that show a layer's attention what its module was given, of one module at a time."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = kwargs.get("hidden_states", args[0] if args else None)
        if session.step is not None and isinstance(states, Tensor):
            session.step.hidden = {module: states}

    layers = (m for m in session.layers if isinstance(getattr(m, "layer_idx", None), int))
    return [m.register_forward_pre_hook(before, with_kwargs=True).remove for m in layers]


def _step(session: Session, cache: Cache | None, arguments: dict[str, Any]) -> Step:
    step = Step(cache=cache, chunked=session.chunked)
    if session.plain:
        return step
    tokens = next(
        (t for n in ("input_ids", "inputs_embeds") if (t := arguments.get(n)) is not None), None
    )
    mask = arguments.get("attention_mask")
    step.length = 0 if tokens is None else tokens.shape[1]
    step.offset = 0 if step.cache is None else int(step.cache.get_seq_length())
    step.positions = arguments.get("position_ids")
    step.ids = arguments.get("input_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.all():
        step.real = mask.bool()
    elif session.keepers and mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise UserError(
            "a cache policy takes a 2-D attention_mask, which tells it the padding; got one of "
            + (f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else type(mask).__name__)
        )
    return step


def _owned(session: Session, cache: Any, arguments: dict[str, Any]) -> DynamicCache:
    """The cache to use: a new one, or the given one with its empty layers replaced in place.

    A cache that was made before, by a fork or from a file, is gone on with as it is.
    """
    model: Any = session.model
    config = model.config.get_text_config(decoder=True)
    keeper = session.keepers[0]
    if cache is None:
        use = arguments.get("use_cache")
        if not (getattr(config, "use_cache", False) if use is None else use):
            raise UserError(f"{type(keeper).__name__} needs the cache; call with use_cache=True")
        cache = DynamicCache(config=config)
    if type(cache) is not DynamicCache or cache.offloading:
        kind = "an offloaded cache" if getattr(cache, "offloading", False) else type(cache).__name__
        raise UserError(
            f"{type(keeper).__name__} cannot work on {kind}; give a DynamicCache or no cache"
        )
    if any(getattr(layer, "managed", False) for layer in cache.layers):
        if cache is not session.cache:
            for part in session.keepers:
                getattr(part, "resume", _as_it_is)(cache.layers, session.model)
        return cache
    if cache.get_seq_length() > 0:
        raise UserError(
            f"{type(keeper).__name__} cannot take over a cache that holds "
            f"{cache.get_seq_length()} tokens already; run the prompt inside attach()"
        )
    layers = cache.layers or fresh_layers(model)
    for part in session.keepers:
        layers = part.cache_layers(layers, session.model)
    cache.layers = layers
    return cache


def _as_it_is(layers: list[Any], model: nn.Module) -> None:
    """For parts that have nothing to do with a cache that is there already."""
