"""What a model's attention modules cache, asked of the modules themselves.

Most cache the keys and values that they then attend to. Some cache latents and make keys of them in each
call, some split what they cached, some write to another place in every loop, and some cache nothing and
read another layer's keys. A module's `forward` says which, in the names between its call of
`cache.update` and its call of the attention function.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable
from functools import cache
from typing import Any, Literal

from torch import nn

from attlas.hf.caches import DynamicLayer, fresh_layers

#: What a layer's cache holds: keys and values as attention reads them, or something that these are made
#: of; "loops" when one module fills several layers of the cache.
Cached = Literal["keys", "latents", "loops"]


def layers_of(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Modules that know the number of their layer, by that number."""
    found: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int) and not isinstance(number, bool):
            found.setdefault(number, []).append(module)
    return found


def cached_by(kind: type[nn.Module]) -> Cached:
    """What a class of attention modules caches; "keys" where its source does not tell."""
    return _cached_by(kind.forward)


@cache
def _cached_by(forward: Any) -> Cached:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return "keys"
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    # attention_interface(self, queries, keys, values, ...)
    read = {
        ast.unparse(argument)
        for call in calls
        if isinstance(call.func, ast.Name) and len(call.args) >= 4 and _is_self(call.args[0])
        for argument in call.args[2:4]
    }
    # keys, values = cache.update(keys, values, layer_idx, ...)
    filled = [
        (node.targets[0], node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Attribute)
        and node.value.func.attr == "update"
        and len(node.value.args) >= 3
        and not ast.unparse(node.value.func).startswith("cross_")
        and ".cross_" not in ast.unparse(node.value.func)
    ]
    for names, call in filled:
        if isinstance(call.args[2], ast.BinOp):
            return "loops"
        given = {ast.unparse(n) for n in names.elts} if isinstance(names, ast.Tuple) else set()
        if read and given != read:
            return "latents"
    return "keys"


def _is_self(argument: ast.expr) -> bool:
    return isinstance(argument, ast.Name) and argument.id == "self"


def caching(model: nn.Module, layers: Iterable[int]) -> dict[int, tuple[Cached, nn.Module]]:
    """What each of these layers caches, where that is not the keys that it reads, and its module."""
    known = layers_of(model)
    found: dict[int, tuple[Cached, nn.Module]] = {}
    for number in layers:
        for module in known.get(number, ()):
            if (kind := cached_by(type(module))) != "keys":
                found[number] = (kind, module)
    return found


def layouts(model: Any) -> list[tuple[int, int]]:
    """Channels of what is cached as keys and as values, of each layer with a cache that grows.

    Layers say their own; where they do not, the model's configuration does.
    """
    config = model.config.get_text_config(decoder=True)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    told = (width, width)
    if values := getattr(config, "v_head_dim", None):
        told = (config.qk_nope_head_dim + config.qk_rope_head_dim, values)
    known = layers_of(model)
    found = []
    for number, layer in enumerate(fresh_layers(model)):
        if type(layer) is DynamicLayer:
            own = (_layout(module) for module in known.get(number, ()))
            found.append(next((layout for layout in own if layout is not None), told))
    return found or [told]


def _layout(module: Any) -> tuple[int, int] | None:
    if cached_by(type(module)) == "latents" and hasattr(module, "kv_lora_rank"):
        return module.kv_lora_rank, module.qk_rope_head_dim
    keys = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None)
    values = getattr(module, "v_head_dim", None) or getattr(module, "head_dim", None)
    return (keys, values) if isinstance(keys, int) and isinstance(values, int) else None


def shared_keys(model: nn.Module) -> dict[int, int]:
    """For each layer without keys of its own, the layer whose keys it reads."""
    found: dict[int, int] = {}
    stored: dict[Any, int] = {}
    for number, modules in sorted(layers_of(model).items()):
        for module in modules:
            kind = getattr(module, "layer_type", None)
            if getattr(module, "is_kv_shared_layer", False):
                told = getattr(module, "kv_shared_layer_index", None)
                source = stored.get(kind) if told is None else told
                if source is not None:
                    found[number] = source
            elif getattr(module, "store_full_length_kv", False):
                stored[kind] = number
    return found
