"""Before and after each forward call of an attached model: the cache made ready, the parts told."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from attlas.attach.call import ForwardPass
from attlas.attach.generating import prompt_goes_on
from attlas.attach.state import Attachment
from attlas.errors import UserError
from attlas.hf.caches import Cache, DynamicCache, cache_in, cache_of, fresh_layers
from attlas.storage.layer import StoredLayer
from attlas.storage.plain import release

#: Names of what a model reads, and of what tells its padding: of a decoder behind an encoder, and else.
TOKENS = {
    True: ("decoder_input_ids", "decoder_inputs_embeds"),
    False: ("input_ids", "inputs_embeds"),
}
PADDING = {True: "decoder_attention_mask", False: "attention_mask"}


def hook(held: Attachment) -> list[Any]:
    """Hooks on the base model, which runs whether the user calls it or the model around it."""
    base = held.model.base_model
    assert isinstance(base, nn.Module)
    names = [name for name in inspect.signature(base.forward).parameters if name != "self"]
    behind = "decoder_input_ids" in names

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = dict(zip(names, args, strict=False)) | kwargs
        if arguments.get("output_attentions") or getattr(base.config, "output_attentions", False):
            raise UserError(
                "attach cannot honour output_attentions: it would hold a length x length matrix "
                "for each layer; use record=['weights']"
            )
        name, given = cache_in(arguments, type(base))
        cache = _owned(held, given, arguments) if held.keepers else given
        _begin(held, _step(held, cache, arguments, behind))
        return None if cache is given else ((), arguments | {name: cache})

    def after(_: nn.Module, __: Any, output: Any) -> None:
        _end(held, cache_of(output))

    return [
        base.register_forward_pre_hook(before, with_kwargs=True).remove,
        base.register_forward_hook(after, always_call=True).remove,
    ]


def _begin(held: Attachment, forward_pass: ForwardPass) -> None:
    """A forward call begins: the cache is made ready and every part is told."""
    held.forward_pass, held.cache = forward_pass, forward_pass.cache
    layers = forward_pass.cache.layers if forward_pass.cache is not None else ()
    held.direct = held.plain and not any(getattr(layer, "managed", False) for layer in layers)
    for part in held.parts:
        part.begin(forward_pass)
    for layer in layers:
        if isinstance(layer, StoredLayer):
            layer.attached = True
            layer.compressed = layer.compressed or forward_pass.ended


def _end(held: Attachment, cache: Any) -> None:
    """A forward call has ended."""
    for layer in held.cache.layers if held.cache is not None else ():
        if isinstance(layer, StoredLayer):
            layer.attached = False
    forward_pass, held.forward_pass = held.forward_pass, None
    if cache is not None:
        held.cache = _own(cache)
        prompt = forward_pass is not None and forward_pass.length > 1
        release(getattr(held.cache, "layers", ()), spare=0 if prompt else 1)
    if (
        forward_pass is not None
        and held.cache is not None
        and forward_pass.length
        and not held.plain
    ):
        own = forward_pass.positions
        if own is None:
            own = torch.arange(forward_pass.offset, forward_pass.offset + forward_pass.length)[None]
        held.remember(forward_pass, own)


def _step(
    held: Attachment, cache: Cache | None, arguments: dict[str, Any], behind: bool
) -> ForwardPass:
    """The call; `behind` says that the model is a decoder behind an encoder."""
    forward_pass = ForwardPass(cache=_own(cache))
    if held.plain:
        return forward_pass
    tokens = next((t for n in TOKENS[behind] if (t := arguments.get(n)) is not None), None)
    mask = arguments.get(PADDING[behind])
    forward_pass.length = 0 if tokens is None else tokens.shape[1]
    forward_pass.offset = (
        0 if forward_pass.cache is None else int(forward_pass.cache.get_seq_length())
    )
    seen = forward_pass.offset + forward_pass.length
    forward_pass.chunked = prompt_goes_on(held, seen)
    forward_pass.ended = forward_pass.length == 1 and forward_pass.offset > 0 and held.prompt is None
    forward_pass.ended &= forward_pass.chunked
    forward_pass.drafted = held.assisted and forward_pass.offset >= (held.prompt or 0)
    forward_pass.positions = arguments.get("position_ids")
    forward_pass.ids = arguments.get(TOKENS[behind][0])
    if forward_pass.cache is not None and tokens is not None:
        forward_pass.earlier = held.earlier(
            forward_pass.cache, forward_pass.offset, tokens.shape[0]
        )
        forward_pass.windows = {
            number: int(layer.get_mask_sizes(forward_pass.length)[1])
            for number, layer in enumerate(forward_pass.cache.layers)
            if getattr(layer, "is_sliding", False) and forward_pass.length
        }
    if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.all():
        forward_pass.valid = mask.bool()
    elif held.keepers and mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise UserError(
            "a cache policy takes a 2-D attention_mask, which tells it the padding; got one of "
            + (f"{mask.ndim} dimensions" if isinstance(mask, Tensor) else type(mask).__name__)
        )
    return forward_pass


def _own(cache: Any) -> Any:
    """Of a decoder behind an encoder the cache of its own tokens."""
    return getattr(cache, "self_attention_cache", cache)


def _owned(held: Attachment, cache: Any, arguments: dict[str, Any]) -> Any:
    """The cache to use: a new one, or the given one with its empty layers replaced in place.

    A cache that was made before, by a fork or from a file, is reused unchanged.
    """
    model: Any = held.model
    config = model.config.get_text_config(decoder=True)
    keeper = held.keepers[0]
    whole = cache
    cache = _own(cache)
    if cache is None:
        use = arguments.get("use_cache")
        if not (getattr(config, "use_cache", False) if use is None else use):
            raise UserError(f"{type(keeper).__name__} needs the cache; call with use_cache=True")
        whole = cache = DynamicCache(config=config)
    if type(cache) is not DynamicCache or cache.offloading:
        kind = "an offloaded cache" if getattr(cache, "offloading", False) else type(cache).__name__
        raise UserError(
            f"{type(keeper).__name__} cannot work on {kind}; give a DynamicCache or no cache"
        )
    if any(getattr(layer, "managed", False) for layer in cache.layers):
        if cache is not held.cache:
            for part in held.keepers:
                getattr(part, "resume", _as_it_is)(cache.layers, held.model)
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
    return whole


def _as_it_is(layers: list[Any], model: nn.Module) -> None:
    """For parts that have nothing to do with a cache that is there already."""
