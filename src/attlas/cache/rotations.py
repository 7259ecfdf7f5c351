"""How a model rotates the keys of each of its layers, found out by asking it.

One token is read at several positions, each alone in its row: it then attends to itself only, whatever
its position, so that the keys of every layer differ by their rotation and by nothing else. They are held
against every rotation that the model has frequencies for. So layers without positions are told from
others, and kinds of layers with frequencies of their own from each other; what is rotated in a way that
is not known here is refused. The model is left as it was, with frequencies that change with the length.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from attlas.attach.state import ATTACHED
from attlas.errors import UserError
from attlas.hf.caches import DynamicCache, with_cache
from attlas.storage.rotary import Rotation

#: Positions at which each token is read; the first leaves keys as they are, but for the scale.
POSITIONS = (0, 1, 7)
#: How many different tokens are read.
TOKENS = 3
#: Share of a key's length by which rotations may miss it: the rounding of half precision.
NEAR = 0.05
#: Kinds of Transformers' rotary embeddings whose frequencies depend on the length.
VARYING = ("dynamic", "longrope")

#: What was found, by model: a layer's rotation, None without one, or why it is not known.
_FOUND: WeakKeyDictionary[nn.Module, dict[int, Rotation | str | None]] = WeakKeyDictionary()


def look(model: nn.Module) -> None:
    """Ask a model that is not attached how it rotates, anew."""
    if not any(module in ATTACHED for module in model.modules()):
        _FOUND[model] = _asked(model)


def rotation_of(model: nn.Module, layer: int, who: str, *, one: bool = False) -> Rotation | None:
    """How `model` rotates the keys of a layer, None when it does not.

    Args:
        model: that `look` has asked, or that is not attached.
        layer: its number.
        who: named in messages.
        one: `who` needs the same rotation for the whole context.

    Raises:
        ValueError: the layer rotates in a way that is not known, or that changes with the length.
    """
    if model not in _FOUND:
        look(model)
    if model not in _FOUND:
        raise UserError(
            f"this {type(model).__name__} is attached already, and {who} has to ask it how it rotates "
            "before that; give all parts to one attach()"
        )
    found = _FOUND[model].get(layer)
    if isinstance(found, str):
        raise UserError(
            f"{who} un-rotates keys or queries, and {type(model).__name__} {found} (layer {layer})"
        )
    if found is not None and one and found.varies:
        raise UserError(
            f"{who} needs one rotation for the whole context, and {type(model).__name__} changes its "
            f"frequencies with the length (rope_type dynamic or longrope, layer {layer}); "
            "expected-attention and streaming-llm(original_positions=False) follow such a change"
        )
    return found


def _asked(model: Any) -> dict[int, Rotation | str | None]:
    candidates = list(_candidates(model))
    base: Any = model.base_model
    names = inspect.signature(base.forward).parameters
    named = "position_ids" in names
    takes = named or any(p.kind is p.VAR_KEYWORD for p in names.values())
    count = len(_fresh(model).layers)
    if not takes:
        why = "takes no position_ids, so that its rotation cannot be looked at"
        return dict.fromkeys(range(count), why if candidates else None)
    with _as_it_was(model, [module for module, *_ in candidates]):
        try:
            keys = _keys(model, base)
        except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            why = f"could not be asked how it rotates: {error}"
            return dict.fromkeys(range(count), why if candidates else None)
        rotations: dict[Any, Rotation] = {}
        found = {
            n: _match(k, candidates, rotations) if isinstance(k, Tensor) else k
            for n, k in keys.items()
        }
    if named or rotations or not candidates or any(isinstance(each, str) for each in found.values()):
        return found
    return dict.fromkeys(found, "has rotary frequencies, but its keys did not move with position_ids")


def _fresh(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _candidates(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, bool]]:
    """(module, buffer of frequencies, attribute of the scale, whether they vary) there are."""
    for module in model.modules():
        own = getattr(module, "frequencies", None)
        if isinstance(own, Tensor) and own.ndim == 1 and hasattr(module, "magnitude"):
            yield module, "frequencies", "magnitude", False
        for name, _ in module.named_buffers(recurse=False):
            if not name.endswith("inv_freq") or name.endswith("original_inv_freq"):
                continue
            kind = name.removesuffix("inv_freq")
            told = getattr(module, "rope_type", "")
            told = told.get(kind.removesuffix("_"), "") if isinstance(told, Mapping) else told
            varies = any(word in str(told) for word in VARYING)
            yield module, name, f"{kind}attention_scaling", varies


@contextmanager
def _as_it_was(model: nn.Module, modules: list[nn.Module]) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards mode and frequencies are what they were."""
    training = [module for module in model.modules() if module.training]
    held = [
        (m, dict(m.__dict__), {n: (b, b.clone()) for n, b in m._buffers.items() if b is not None})
        for m in dict.fromkeys(modules)
    ]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for module, attributes, buffers in held:
            for name in set(module.__dict__) - set(attributes):
                del module.__dict__[name]
            module.__dict__.update(attributes)
            for name, (buffer, values) in buffers.items():
                module._buffers[name] = buffer
                if not torch.equal(buffer, values):
                    buffer.copy_(values)


def _keys(model: Any, base: Any) -> dict[int, Tensor | str | None]:
    """Keys [tokens, positions, kv_heads, dim] of each cache layer; None of one that holds none."""
    tokens = torch.tensor(_usual_tokens(model)).repeat_interleave(len(POSITIONS))[:, None]
    positions = torch.tensor(POSITIONS).repeat(len(tokens) // len(POSITIONS))[:, None]
    device = model.get_input_embeddings().weight.device
    cache = _fresh(model)
    base(
        input_ids=tokens.to(device), position_ids=positions.to(device), use_cache=True,
        **with_cache(base, cache),
    )  # fmt: skip
    found: dict[int, Tensor | str | None] = {}
    for number, layer in enumerate(cache.layers):
        held: list[Any] = [getattr(layer, name, None) for name in ("keys", "values")]
        if not all(isinstance(x, Tensor) and x.ndim == 4 and x.shape[2] == 1 for x in held):
            found[number] = None
            continue
        k, v = (x[:, :, 0].float().unflatten(0, (-1, len(POSITIONS))) for x in held)
        still = [float((x - x[:, :1]).norm() / x.norm().clamp(min=1e-30)) < NEAR for x in (k, v)]
        # A cache of latents has what is rotated in the place of values.
        found[number] = "rotates what it holds beside its keys" if still == [True, False] else k
    return found


def _usual_tokens(model: Any) -> list[int]:
    """Some tokens spread over the vocabulary, none of which stands for an image, padding or the like."""
    config = model.config.get_text_config(decoder=True)
    special: set[Any] = set()
    for known in (config, model.config):
        for name, value in vars(known).items():
            if name.endswith(("token_id", "token_index")):
                special.update(value if isinstance(value, list | tuple) else [value])
    size = config.vocab_size
    step = max(1, size // (2 * TOKENS + 1))
    usual = [token for token in range(size // 4, size, step) if token not in special]
    return usual[:TOKENS] or [size - 1]


def _match(
    keys: Tensor, candidates: list[tuple[nn.Module, str, str, bool]], rotations: dict[Any, Rotation]
) -> Rotation | str | None:
    """The rotation that makes the keys at all positions of those at the first; None for none."""
    start, length = keys[:, :1].expand_as(keys), keys.norm().clamp(min=1e-30)
    still = float((keys - start).norm() / length)
    best, best_key, miss = None, None, still
    positions = torch.tensor(POSITIONS, device=keys.device)
    for module, name, scale, varies in candidates:
        for layout in _layouts(getattr(module, name).shape[-1], keys.shape[-1]):
            tried = Rotation(module, name, scale, layout[1], varies)
            rotary = tried.now()
            cos, sin = (x[:, :, None] for x in rotary.angles(positions[None]))
            wanted = rotary.turn(start / rotary.scale, cos, sin)
            error = float((keys - wanted).norm() / length)
            if error < miss:
                known = (module, name, layout[0])
                best, miss = rotations.get(known, tried), error
                best_key = known
    if best is None and still < NEAR:
        return None
    if best is not None and miss < NEAR:
        return rotations.setdefault(best_key, best)
    lengths = keys.norm(dim=-1)
    moved = float((lengths - lengths[:, :1]).norm() / lengths[:, :1].norm().clamp(min=1e-30))
    if not candidates and moved >= NEAR:
        return None  # positions are added before the projections, as in GPT-2
    return "rotates its keys in a way that is not known here"


def _layouts(pairs: int, dim: int) -> Iterator[tuple[str, Tensor | None]]:
    """(name, order of channels) of the ways in which so many pairs of channels can stand in a key."""
    width = 2 * pairs
    if width > dim:
        return
    halves, every = torch.arange(width), torch.arange(dim)
    pairwise = torch.cat([halves[::2], halves[1::2]])
    yield "halves", None
    yield "pairs", torch.cat([pairwise, every[width:]])
    if width < dim:
        rest = dim - width
        yield "last halves", torch.cat([rest + halves, every[:rest]])
        yield "last pairs", torch.cat([rest + pairwise, every[:rest]])
