"""What a model's attention modules cache, asked of the modules themselves.

Most cache the keys and values that they then attend to. Some cache latents and make keys of them in each
call, some split what they cached, some write to another place in every loop, and some cache nothing and
read another layer's keys. A module's `forward` says which, in the names between its call of
`cache.update` and its call of the attention function.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterable
from functools import cache
from typing import Any, Literal

from torch import nn

from attlas.hf.caches import NAMES, Cache, DynamicLayer, fresh_layers

#: What a layer's cache holds: keys and values as attention reads them; latents of which these are made;
#: what several calls of attention read parts of; or, of a module that is run in loops, one of its turns.
Cached = Literal["keys", "latents", "parts", "turns"]


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
    nodes = list(ast.walk(tree))
    filled = [found for node in nodes if (found := _filling(node)) is not None]
    reads = [told for node in nodes if (told := _reading(node)) is not None]
    if not all(own for _, _, own in filled):
        return "turns"
    if filled and len({frozenset(names) for _, names in reads}) > 1:
        return "parts"
    for line, names, _ in filled:
        for stop, read in reads:
            if names != read or any(_remade(node, read, line, stop) for node in nodes):
                return "latents"
    return "keys"


def _filling(node: ast.AST) -> tuple[int, set[str], bool] | None:
    """(line, names, whether in the module's own layer) of `names = cache.update(..., layer, ...)`."""
    if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
        return None
    call, names = node.value, node.targets[0]
    if not (isinstance(call.func, ast.Attribute) and call.func.attr == "update"):
        return None
    if len(call.args) < 3 or not isinstance(names, ast.Tuple) or "cross" in ast.unparse(call.func):
        return None
    given = {ast.unparse(name) for name in names.elts}
    return node.lineno, given, isinstance(call.args[2], ast.Attribute)


def _reading(node: ast.AST) -> tuple[int, set[str]] | None:
    """(line, names of keys and values) of `attention_interface(self, queries, keys, values, ...)`."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) >= 4):
        return None
    if not (isinstance(node.args[0], ast.Name) and node.args[0].id == "self"):
        return None
    return node.lineno, {ast.unparse(name) for name in node.args[2:4]}


def _remade(node: ast.AST, names: set[str], after: int, before: int) -> bool:
    """Whether a statement between two lines gives one of the names another value."""
    if not isinstance(node, ast.Assign) or not after < node.lineno < before:
        return False
    given = [n for t in node.targets for n in (t.elts if isinstance(t, ast.Tuple) else [t])]
    return bool(names & {ast.unparse(name) for name in given})


def caching(model: nn.Module, layers: Iterable[int]) -> dict[int, tuple[Cached, nn.Module]]:
    """What each of these layers caches, where that is not the keys that it reads, and its module."""
    known = layers_of(model)
    found: dict[int, tuple[Cached, nn.Module]] = {}
    for number in layers:
        for module in known.get(number, ()):
            other = "cross" in type(module).__name__.lower()  # attends to no tokens of the model's
            if not other and (kind := cached_by(type(module))) != "keys":
                found[number] = (kind, module)
    return found


def layouts(model: Any) -> list[tuple[int, int]]:
    """Channels of what is cached as keys and as values, of each layer with a cache that grows.

    Layers say their own; where they do not, the model's configuration does.
    """
    known, found = layers_of(model), []
    for number, layer in enumerate(fresh_layers(model)):
        if type(layer) is DynamicLayer:
            own = (_layout(module) for module in known.get(number, ()))
            layout = next((layout for layout in own if layout is not None), None)
            found.append(_told(model, number) if layout is None else layout)
    return found


def cached_channels(model: Any) -> list[int]:
    """Numbers that a token takes in each layer with a cache that grows, keys and values together."""
    config, known = model.config.get_text_config(decoder=True), layers_of(model)
    growing = [i for i, layer in enumerate(fresh_layers(model)) if type(layer) is DynamicLayer]
    found = []
    for number, layout in zip(growing, layouts(model), strict=True):
        one = any(cached_by(type(module)) == "latents" for module in known.get(number, ()))
        found.append(sum(layout) * (1 if one else kv_heads(config, number)))
    return found


def kv_heads(config: Any, layer: int) -> int:
    """Key heads of a layer, of which another may have other numbers."""
    own = layer_config(config, layer)
    return getattr(own, "num_key_value_heads", None) or own.num_attention_heads  # type: ignore[no-any-return]


def layer_config(config: Any, layer: int) -> Any:
    """The configuration as it is for one layer."""
    each = getattr(config, "per_layer_config", None)
    return config if each is None else each[layer]


def _told(model: Any, layer: int) -> tuple[int, int]:
    config = layer_config(model.config.get_text_config(decoder=True), layer)
    if values := getattr(config, "v_head_dim", None):
        return (config.qk_nope_head_dim + config.qk_rope_head_dim, values)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (width, width)


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


def own_cache(model: nn.Module) -> str | None:
    """The kind of cache that a model makes itself and takes no other in place of; None for most."""
    names = vars(sys.modules[type(model).__module__])
    kinds = (kind for kind in names.values() if isinstance(kind, type) and issubclass(kind, Cache))
    return next((k.__name__ for k in kinds if k.__module__ == type(model).__module__), None)


def takes_cache(model: Any) -> bool:
    """Whether a model is given the cache that it is to fill."""
    known = inspect.signature(model.forward).parameters
    return any(name in known for name in NAMES)
