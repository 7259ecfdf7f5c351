"""Before and after each forward call of an attached model: the cache made ready, the parts told."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attlas.attach import again, hooks
from attlas.attach.call import ForwardPass
from attlas.attach.generating import prompt_goes_on
from attlas.attach.prefill import tokens_of
from attlas.attach.state import Attachment
from attlas.attach.towers import READS
from attlas.attach.under import PASS, Under
from attlas.errors import UserError
from attlas.hf import interface
from attlas.hf.caches import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    cache_in,
    cache_of,
    fresh_layers,
    own_tokens,
)
from attlas.storage.layer import StoredLayer
from attlas.storage.plain import release

#: Names of what a model reads, and of what tells its padding: of a decoder behind an encoder, and else.
TOKENS = {
    True: ("decoder_input_ids", "decoder_inputs_embeds"),
    False: READS,
}
PADDING = {True: "decoder_attention_mask", False: "attention_mask"}


class Given:
    """The arguments of a model's call, by what they tell of its tokens."""

    def __init__(self, model: nn.Module) -> None:
        self.names = [n for n in inspect.signature(model.forward).parameters if n != "self"]
        self.behind = "decoder_input_ids" in self.names

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name, those of a decoder behind an encoder as any other decoder's."""
        found = dict(zip(self.names, args, strict=False)) | kwargs
        if self.behind:
            names = (*zip(TOKENS[False], TOKENS[True], strict=True), (PADDING[False], PADDING[True]))
            return found | {plain: found.get(name) for plain, name in names}
        return found


def hook(held: Attachment) -> list[Callable[[], Any]]:
    """Hooks on the tower, which runs whoever calls it, and on the models around it."""
    base: Any = held.tower.module
    names, told = [*inspect.signature(base.forward).parameters], Given(base)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if module is not base:  # its modules are others than those that are attached
            raise UserError(
                f"a replica of {type(base).__name__} was called (DataParallel), of which nothing is "
                "attached; use one device, or DistributedDataParallel"
            )
        arguments = dict(zip(names, args, strict=False)) | kwargs
        _check(held, arguments)
        name, given = cache_in(arguments, type(base))
        cache = _owned(held, given, arguments) if held.keepers else given
        _begin(held, _step(held, cache, told(args, kwargs)))
        return None if cache is given else ((), arguments | {name: cache})

    def after(_: nn.Module, __: Any, output: Any) -> None:
        _end(held, cache_of(output))

    return [
        *_listen_around(held),
        hooks.before(base, before),
        hooks.after(base, after, always=True),
    ]


def _listen_around(held: Attachment) -> list[Callable[[], Any]]:
    """Hooks on the models around the tower, whose arguments tell what does not reach it.

    A model that reads pictures gives the tower embeddings, and some the masks that it has made.
    """
    undo: list[Callable[[], Any]] = []
    for model in held.tower.outer if held.parts else ():
        told = Given(model)

        def note(module: nn.Module, args: Any, kwargs: Any, told: Given = told) -> None:
            arguments = told(args, kwargs)
            _refuse_attentions(module, arguments)
            held.around[module] = arguments

        def leave(module: nn.Module, _: Any, __: Any) -> None:
            held.around.pop(module, None)

        undo += [hooks.before(model, note), hooks.after(model, leave, always=True)]
    return undo


def _check(held: Attachment, arguments: dict[str, Any]) -> None:
    """Refuse a call in which parts would not be called, or could not do what they promise."""
    base: Any = held.tower.module
    _refuse_attentions(base, arguments)
    name = interface.implementation(base.config)
    if not held.own and not isinstance(name, interface.Attached):
        raise UserError(
            f"the attention of {type(base).__name__} was set to {name!r} inside the with block, so that "
            "no part would be called; call set_attn_implementation() before attach()"
        )
    if not held.plain and again.checkpoints(base):
        if held.keepers:
            raise UserError(
                f"{type(held.keepers[0]).__name__} needs the cache, which gradient checkpointing leaves "
                "out; call model.eval(), or train without gradient checkpointing"
            )
        if wanting := next((p for p in held.parts if p.wants_gradients), None):
            raise UserError(
                f"{type(wanting).__name__} is shown weights with their gradients, which gradient "
                "checkpointing computes twice; train without gradient checkpointing"
            )
        again.follow(held)


def _refuse_attentions(model: Any, arguments: dict[str, Any]) -> None:
    if arguments.get("output_attentions") or getattr(model.config, "output_attentions", False):
        raise UserError(
            "attach cannot honour output_attentions: it would hold a length x length matrix "
            "for each layer; use record=['weights']"
        )


def _begin(held: Attachment, forward_pass: ForwardPass) -> None:
    """A forward call begins: the cache is made ready and every part is told."""
    _check_thread(held, forward_pass)
    layers = forward_pass.cache.layers if forward_pass.cache is not None else ()
    direct = held.plain and not any(getattr(layer, "managed", False) for layer in layers)
    held.under = Under(forward_pass, direct, before=PASS.get())
    held.cache = forward_pass.cache
    PASS.set(forward_pass)
    for part in held.parts:
        part.begin(forward_pass)
    for layer in layers:
        if isinstance(layer, StoredLayer):
            layer.attached = True
            layer.compressed = layer.compressed or forward_pass.ended


def _check_thread(held: Attachment, forward_pass: ForwardPass) -> None:
    """Several threads may call a model at once, whose caches are apart, unless a part keeps a record."""
    here = threading.get_ident()
    other = forward_pass.offset and held.last_thread not in (None, here)
    mixed = other and forward_pass.cache is not held.cache
    if held.keeping and (mixed or held.threads - {here}):
        raise UserError(
            f"{type(held.keeping[0]).__name__} follows one sequence, and several threads call this model "
            "at once; make one call at a time, or attach to a copy of the model in each thread"
        )
    held.threads.add(here)
    held.last_thread = here


def _end(held: Attachment, cache: Any) -> None:
    """A forward call has ended."""
    under, held.under = held.under, None
    held.threads.discard(threading.get_ident())
    if under is None:
        return
    forward_pass = under.forward_pass
    PASS.set(under.before)
    for layer in forward_pass.cache.layers if forward_pass.cache is not None else ():
        if isinstance(layer, StoredLayer):
            layer.attached = False
    if cache is not None:
        held.cache = forward_pass.cache = own_tokens(cache)
        release(getattr(held.cache, "layers", ()), spare=0 if forward_pass.length > 1 else 1)
    if forward_pass.cache is not None and forward_pass.length and not held.plain:
        own = forward_pass.positions
        if own is None:
            own = torch.arange(forward_pass.offset, forward_pass.offset + forward_pass.length)[None]
        held.remember(forward_pass, own)


def _step(held: Attachment, cache: Cache | None, arguments: dict[str, Any]) -> ForwardPass:
    """The call, as its arguments and those of the models around the tower tell."""
    forward_pass = ForwardPass(cache=own_tokens(cache))
    tokens = tokens_of(arguments)
    forward_pass.length = 0 if tokens is None else tokens.shape[1]
    forward_pass.offset = (
        0 if forward_pass.cache is None else int(forward_pass.cache.get_seq_length())
    )
    if held.plain and not held.captures:
        return forward_pass
    seen = forward_pass.offset + forward_pass.length
    forward_pass.chunked = prompt_goes_on(held, seen)
    forward_pass.ended = forward_pass.length == 1 and forward_pass.offset > 0 and held.prompt is None
    forward_pass.ended &= forward_pass.chunked
    forward_pass.drafted = held.assisted and forward_pass.offset >= (held.prompt or 0)
    forward_pass.positions = arguments.get("position_ids")
    if tokens is not None:
        forward_pass.ids = _ids(held, arguments, tokens.shape[:2])
    if forward_pass.cache is not None and tokens is not None:
        forward_pass.earlier = held.earlier(
            forward_pass.cache, forward_pass.offset, tokens.shape[0]
        )
        forward_pass.windows = {
            number: int(layer.get_mask_sizes(forward_pass.length)[1])
            for number, layer in enumerate(forward_pass.cache.layers)
            if getattr(layer, "is_sliding", False) and forward_pass.length
        }
    mask = _mask(held, arguments, forward_pass.offset + forward_pass.length)
    if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.all():
        forward_pass.valid = mask.bool()
    elif held.keepers and mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise UserError(
            "a cache policy takes a 2-D attention_mask, which tells it the padding; got one of "
            + (f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else type(mask).__name__)
        )
    return forward_pass


def _ids(held: Attachment, arguments: dict[str, Any], shape: torch.Size) -> Tensor | None:
    """The ids of the tokens, where the tower or a model around it is given them."""
    for given in (arguments, *held.around.values()):
        ids = given.get("input_ids")
        if ids is not None and ids.shape == shape:
            return ids  # type: ignore[no-any-return]
    return None


def _mask(held: Attachment, arguments: dict[str, Any], seen: int) -> Any:
    """The mask that tells the padding: the tower's if it is 2-D, else that of a model around it.

    A mask that a model around it has made of none tells of no padding.
    """
    mask = arguments.get("attention_mask")
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2) or not held.around:
        return mask
    around = [m for given in held.around.values() if (m := given.get("attention_mask")) is not None]
    flat = (m for m in around if isinstance(m, Tensor) and m.ndim == 2 and m.shape[1] == seen)
    return next(flat, mask if around else None)


def _owned(held: Attachment, cache: Any, arguments: dict[str, Any]) -> Any:
    """The cache to use: a new one, or the given one with its empty layers replaced in place.

    A cache that was made before, by a fork or from a file, is reused unchanged.
    """
    model: Any = held.model
    config = model.config.get_text_config(decoder=True)
    keeper = held.keepers[0]
    whole = cache
    cache = own_tokens(cache)
    if cache is None:
        use = arguments.get("use_cache")
        if not (getattr(config, "use_cache", False) if use is None else use):
            raise UserError(f"{type(keeper).__name__} needs the cache; call with use_cache=True")
        whole = cache = DynamicCache(config=config)
        if arguments.get("encoder_hidden_states") is not None and not held.own:
            whole = EncoderDecoderCache(cache, DynamicCache(config=config))
    if type(cache) is not DynamicCache or cache.offloading:
        kind = "an offloaded cache" if getattr(cache, "offloading", False) else type(cache).__name__
        raise UserError(
            f"{type(keeper).__name__} cannot work on {kind}; give a DynamicCache or no cache"
        )
    if any(getattr(layer, "managed", False) for layer in cache.layers):
        if cache not in held.caches:
            for part in held.keepers:
                getattr(part, "resume", _as_it_is)(cache.layers, held.model)
            held.caches.add(cache)
        return whole
    if cache.get_seq_length() > 0:
        raise UserError(
            f"{type(keeper).__name__} cannot take over a cache that holds "
            f"{cache.get_seq_length()} tokens already; run the prompt inside attach()"
        )
    layers = cache.layers or fresh_layers(model)
    for part in held.keepers:
        layers = part.cache_layers(layers, held.model)
    cache.layers = layers
    held.caches.add(cache)
    return whole


def _as_it_is(layers: list[Any], model: nn.Module) -> None:
    """For parts that have nothing to do with a cache that is there already."""
