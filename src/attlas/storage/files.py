"""Stored caches: a compressed prompt as a safetensors file, to be read once and asked many times.

The file holds every tensor of every layer and, as text, what makes them a cache again: kinds of
bodies, counts, and which model, type and length the cache is of. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from attlas.errors import UserError
from attlas.hf.caches import (
    DUMMY_LAYERS,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    filled,
    fresh_layers,
)
from attlas.storage.body import KINDS
from attlas.storage.layer import LayerState, StoredLayer
from attlas.storage.plain import put_together, taken_apart
from attlas.storage.plain import tensors as held

FORMAT = "attlas-cache-1"
#: Kinds of Transformers' layers that a file holds.
STORABLE = (
    DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer,
    *DUMMY_LAYERS,
)  # fmt: skip


def save_cache(cache: DynamicCache, path: str | Path, model: nn.Module) -> None:
    """Write a cache that `model` filled to `path`.

    Raises:
        ValueError: a cache with layers that cannot be stored, or a path that cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    layers = []
    for number, layer in enumerate(cache.layers):
        if not isinstance(layer, StoredLayer) and type(layer) not in STORABLE:
            raise UserError(
                f"layer {number} is a {type(layer).__name__}, which cannot be stored; "
                f"{', '.join(kind.__name__ for kind in STORABLE)} can"
            )
        layers.append(_layer_out(layer, f"{number}.", tensors))
    about = {"format": FORMAT, "model": fingerprint(model), "dtype": _name(_dtype(cache)),
             "tokens": int(cache.get_seq_length()), "layers": layers}  # fmt: skip
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        whole = {name: t.detach().contiguous() for name, t in tensors.items()}
        save_file(whole, partial, metadata={"attlas": json.dumps(about)})
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write the cache to {path}: {error.strerror}") from error


def load_cache(path: str | Path, model: nn.Module, *, tokens: int | None = None) -> DynamicCache:
    """A cache that `save_cache` wrote, on the model's device; go on inside `attach`.

    Args:
        path: the file.
        model: the model that filled it.
        tokens: length that the context must have; any unless given.

    Raises:
        ValueError: no such file or a damaged one; another model, type or length, naming both sides.
    """
    device = next(model.parameters()).device
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            about = json.loads((file.metadata() or {}).get("attlas", "null"))
            if not isinstance(about, dict) or about.get("format") != FORMAT:
                raise UserError(f"{path} is no cache stored by attlas")
            _check(path, about, model, tokens)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        cache = DynamicCache()
        fresh = fresh_layers(model)
        cache.layers = [
            _plain_in(told, f"{number}.", tensors, fresh, number)
            if "kind" in told
            else _layer_in(told, f"{number}.", tensors)
            for number, told in enumerate(about["layers"])
        ]
    except FileNotFoundError:
        raise UserError(f"there is no stored cache at {path}") from None
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"the stored cache at {path} is damaged: {error}") from error
    return cache


def _check(path: Any, about: dict[str, Any], model: nn.Module, tokens: int | None) -> None:
    stored, asked = about["model"], fingerprint(model)
    for what in asked:
        if stored.get(what) != asked[what]:
            raise UserError(
                f"the cache at {path} is of another model: its {what} is {stored.get(what)}, "
                f"this model's is {asked[what]}"
            )
    dtype = _name(next(model.parameters()).dtype)
    if about["dtype"] != dtype:
        raise UserError(
            f"the cache at {path} holds {about['dtype']}, this model computes in {dtype}; "
            f"load the model in {about['dtype']}, or read the prompt anew"
        )
    if tokens is not None and about["tokens"] != tokens:
        raise UserError(
            f"the cache at {path} is of a context of {about['tokens']} tokens, {tokens} were asked for"
        )


def fingerprint(model: Any) -> dict[str, Any]:
    """What tells one model from another in any precision: kind, sizes, signs of embedded numbers."""
    config = model.config.get_text_config(decoder=True)
    sizes = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")
    weights = model.get_input_embeddings().weight.detach()
    sample = weights.flatten()[:: max(1, weights.numel() // 4096)] > 0
    digest = hashlib.sha256(sample.cpu().numpy().tobytes()).hexdigest()[:16]
    return {
        "kind": config.model_type,
        **{size: getattr(config, size, None) for size in sizes},
        "weights": digest,
    }


def _dtype(cache: DynamicCache) -> torch.dtype:
    """That of the first keys; states, which may be held in another, tell it where there are none."""
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    states = [x for layer in cache.layers for x in getattr(layer, "states", {}).values()]
    for tensor in (*keys, *states, *held(cache.layers)):
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            return tensor.dtype
    raise UserError("the cache is empty; there is nothing to store")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _layer_out(layer: Any, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if type(layer) not in (DynamicLayer, StoredLayer):
        found, values = taken_apart(layer)
        tensors |= {f"{prefix}plain.{path}": tensor for path, tensor in found.items()}
        return {"kind": type(layer).__name__, "values": values}
    keys = isinstance(layer.keys, Tensor)
    if keys:
        tensors |= {f"{prefix}keys": layer.keys, f"{prefix}values": layer.values}
    if not isinstance(layer, StoredLayer):
        return {"stored": False, "keys": keys}
    tensors |= {f"{prefix}state.{name}": state for name, state in layer.states.items()}
    if layer.index is not None:
        tensors[f"{prefix}index"] = layer.index
    bodies = {}
    for name, body in layer.bodies.items():
        bodies[name] = {"kind": body.kind, "constants": body.constants}
        tensors |= {f"{prefix}body.{name}.{part}": t for part, t in body.tensors.items()}
    learned = {}
    for name, state in layer.learned.items():
        learned[name] = {
            "layer": state.layer, "scaling": state.scaling, "latent": state.latent,
        }  # fmt: skip
        tensors |= {f"{prefix}learned.{name}.{part}": t for part, t in state.tensors.items()}
    return {
        "stored": True, "keys": keys, "seen": layer.seen, "fixed": layer.fixed, "ragged": layer.ragged,
        "compressed": layer.compressed, "bodies": bodies, "learned": learned,
    }  # fmt: skip


def _plain_in(
    told: dict[str, Any], prefix: str, tensors: dict[str, Tensor], fresh: list[Any], number: int
) -> Any:
    made = type(fresh[number]).__name__ if number < len(fresh) else "missing"
    if made != told["kind"]:
        raise UserError(f"layer {number} of the cache is a {told['kind']}, this model's is {made}")
    start = f"{prefix}plain."
    found = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
    return put_together(fresh[number], found, told["values"])


def _layer_in(told: dict[str, Any], prefix: str, tensors: dict[str, Tensor]) -> DynamicLayer:
    def under(start: str) -> dict[str, Tensor]:
        start = prefix + start
        return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}

    layer = StoredLayer() if told["stored"] else DynamicLayer()
    if told["keys"]:
        filled(layer, tensors[f"{prefix}keys"], tensors[f"{prefix}values"])
    if isinstance(layer, StoredLayer):
        for name in ("seen", "fixed", "ragged", "compressed"):
            setattr(layer, name, told[name])
        layer.index = tensors.get(f"{prefix}index")
        layer.states = under("state.")
        for name, body in told["bodies"].items():
            made = KINDS[body["kind"]].restored(under(f"body.{name}."), body["constants"])
            layer.bodies[name] = made
        for name, state in told["learned"].items():
            found = under(f"learned.{name}.")
            layer.learned[name] = LayerState(
                state["layer"], (), scaling=state["scaling"], latent=state.get("latent", False),
                tensors=found,
            )
    return layer
