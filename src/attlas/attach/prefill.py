"""How many tokens of a prompt a model reads at once: all of them, or as many as memory allows.

What a call needs beside weights and cache grows with its tokens, and at a hundred thousand it is as much
as the weights. Where that does not fit, the call is made in pieces behind one another, as if the user had
made them: parts and cache policies see a prompt that comes in several calls.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from attlas.attach.part import Part
from attlas.attach.state import Attachment
from attlas.attach.towers import READS, Tower
from attlas.catalog.registry import entry_of
from attlas.hf.caches import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    cache_in,
    fresh_layers,
)
from attlas.storage.layer import StoredLayer
from attlas.storage.rotary import changing_with_length

log = logging.getLogger("attlas")

#: Arguments of a model that hold something for each token of a call, along this axis.
BY_TOKEN = {
    "input_ids": 1, "inputs_embeds": 1, "position_ids": -1, "cache_position": -1, "per_layer_inputs": 1,
}  # fmt: skip
#: Tokens of a piece, rows counted: fewer leave a device idle, more gain nothing on it.
LEAST, MOST = 512, 8192
#: Tensors of the widest layer's and of the hidden width that live at once in a layer of a model.
ALIVE = 4
#: Layers of a cache behind which several tokens may come in one call.
GROWING = (DynamicLayer, DynamicSlidingWindowLayer, StoredLayer)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that may be allocated on a device; None where that cannot be told."""
    if device.type != "cuda":
        return None
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def pieces(held: Attachment, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls to make in place of one of the tower's: itself alone where memory allows it."""
    whole, tokens = length(arguments), tokens_of(arguments)
    if whole <= LEAST or tokens is None or not len(tokens):
        return [arguments]
    size = _size(held.tower, len(tokens), whole)
    if size is None or not _may_be_cut(held, arguments):
        return [arguments]
    arguments = _with_cache(held, arguments)
    count = -(-whole // size)
    log.info("%d tokens are read in %d pieces, for want of memory", whole, count)
    ends = [whole * (i + 1) // count for i in range(count)]
    return [cut(arguments, start, stop, whole) for start, stop in pairwise([0, *ends])]


def length(arguments: dict[str, Any]) -> int:
    """Tokens of a call."""
    tokens = tokens_of(arguments)
    return 0 if tokens is None else tokens.shape[1]


def tokens_of(arguments: dict[str, Any]) -> Tensor | None:
    """The tokens of a call, ids [batch, tokens] or embeddings; None where there are none."""
    found = (arguments.get(name) for name in READS)
    return next((t for t in found if isinstance(t, Tensor) and t.ndim > 1), None)


def _size(tower: Tower, rows: int, tokens: int) -> int | None:
    """Tokens of a piece; None where all can be read at once."""
    weight = next(tower.module.parameters())
    free = free_bytes(weight.device)
    if free is None:
        return None
    spare = free - rows * tokens * _kept_bytes(tower, weight.element_size())
    each = rows * _live_bytes(tower, weight.element_size())
    if tokens * each <= spare:
        return None
    return max(LEAST // rows, min(MOST // rows, spare // 2 // each), 2)


def _live_bytes(tower: Tower, size: int) -> int:
    """About how much a token takes while a layer computes, in several experts where there are some."""
    base: Any = tower.module
    hidden, config = _hidden(tower), base.config.get_text_config()
    experts = [max(p.shape[1:]) for p in base.parameters() if p.ndim == 3]
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    widest = max(*_widths(base), hidden, chosen * max(experts, default=0))
    return size * ALIVE * (hidden + widest)


def _kept_bytes(tower: Tower, size: int) -> int:
    """About what a token's keys and values take: the least that attention projects to, twice a layer."""
    return 2 * size * sum(min(_widths(layer), default=_hidden(tower)) for layer in tower.layers)


def _widths(module: nn.Module) -> list[int]:
    return [m.out_features for m in module.modules() if isinstance(m, nn.Linear)]


def _hidden(tower: Tower) -> int:
    base: Any = tower.module
    return int(base.config.get_text_config().hidden_size)


def _may_be_cut(held: Attachment, arguments: dict[str, Any]) -> bool:
    """Whether the calls of the pieces give what the one call would give."""
    base: Any = held.tower.module
    name, cache = cache_in(arguments, type(base))
    use = arguments.get("use_cache")
    used = getattr(base.config, "use_cache", False) if use is None else use
    if not used or torch.is_grad_enabled() or base.training or held.own:
        return False
    if any(map(_wants_whole, held.parts)):
        return False
    if changing_with_length(base) is not None:  # by that of the text that a call ends
        return False
    mask = arguments.get("attention_mask")
    flat = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
    others = [n for n in arguments if n not in (*BY_TOKEN, "attention_mask", name)]
    if not flat or any(isinstance(arguments[n], (Tensor, dict)) for n in others):
        return False
    if cache is not None and (type(cache) is not DynamicCache or cache.offloading):
        return False
    layers = (cache and cache.layers) or fresh_layers(held.model)
    own = [layer for number, layer in enumerate(layers) if number not in held.sources]
    return all(type(layer) in GROWING and not getattr(layer, "states", None) for layer in own)


def _wants_whole(part: Part) -> bool:
    told = part.whole_prompts
    return entry_of(type(part)) is None if told is None else told


def _with_cache(held: Attachment, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a cache, that the pieces have in common."""
    name, cache = cache_in(arguments, type(held.tower.module))
    model: Any = held.model
    made = DynamicCache(config=model.config.get_text_config(decoder=True)) if cache is None else cache
    return arguments | {name: made}


def cut(arguments: dict[str, Any], start: int, stop: int, whole: int) -> dict[str, Any]:
    """A call of the tokens from `start` to `stop`, of a call of `whole` tokens."""
    found = dict(arguments)
    for name, axis in BY_TOKEN.items():
        if isinstance(given := arguments.get(name), Tensor):
            found[name] = given.narrow(axis, start, stop - start)
    mask = arguments.get("attention_mask")
    if isinstance(mask, Tensor):
        found["attention_mask"] = mask[:, : mask.shape[1] - (whole - stop)]
    return found


def joined(outputs: list[Any]) -> Any:
    """What several calls gave, one behind the other, as one call would have given it."""
    last = outputs[-1]
    if isinstance(last, tuple):
        return tuple(_whole(list(each)) for each in zip(*outputs, strict=True))
    for name in last:
        last[name] = _whole([output.get(name) for output in outputs])
    return last


def _whole(found: list[Any]) -> Any:
    """One value of several calls' outputs: joined along the tokens, or the last where it has none."""
    if all(isinstance(each, Tensor) and each.ndim == 3 for each in found):
        return torch.cat(found, dim=1)
    if all(isinstance(each, tuple) for each in found):
        return tuple(_whole(list(each)) for each in zip(*found, strict=True))
    return found[-1]
