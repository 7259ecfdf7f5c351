"""How attlas takes hold of a model's attention, and lets go.

Three private names are left here. `_attn_implementation`: of a configuration, since no public name tells
which implementation is set, and `set_attn_implementation` cannot set one configuration alone, so that a
model with parts of several could not be put back. `_global_mapping`: of the two interfaces, which have a
public `register` and nothing to take an entry back. `_gradient_checkpointing_func`: what
`gradient_checkpointing_enable` sets on each block, and what a block is computed again by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

__all__ = [
    "Attached",
    "PreTrainedModel",
    "checkpointing",
    "configurations",
    "forget",
    "implementation",
    "plainly",
    "register",
    "registered",
    "restore",
    "sdpa_attention_forward",
    "set_checkpointing",
]


class Attached(str):
    """The name of an attention function, which a copy of what holds it does not take along.

    Attributes:
        before: the attention that stood in its place, and stands in copies.
    """

    before: Any

    def __new__(cls, name: str, before: Any) -> Attached:
        """A name, and what stood in its place."""
        made = super().__new__(cls, name)
        made.before = before
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self.before,)


def register(
    name: str,
    function: Callable[..., Any],
    no_mask: Callable[[tuple[int, int] | None], bool] = lambda _: False,
) -> None:
    """An attention function under a name, with SDPA's masks; none where `no_mask` says so.

    It is told (tokens before the queries, queries) where a mask would say no more than that each query
    sees all keys up to its own, else None. Both are registered together: with the function alone
    Transformers would give no mask at all, and padding and causality would be lost silently.
    """

    def mask(**asked: Any) -> Tensor | None:
        return None if no_mask(_only_causal(asked)) else sdpa_mask(**asked)

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask)


def _only_causal(asked: dict[str, Any]) -> tuple[int, int] | None:
    """(tokens before the queries, queries) of a mask that hides nothing but later tokens; else None."""
    queries, before, padding = asked["q_length"], asked.get("q_offset"), asked.get("attention_mask")
    if torch.compiler.is_compiling() or not isinstance(before, int):  # a static cache's is a tensor
        return None
    if asked.get("mask_function") is not causal_mask_function or not asked.get("allow_is_causal_skip"):
        return None
    if asked.get("kv_offset") or asked["kv_length"] != before + queries:
        return None
    if padding is not None and (padding.shape[-1] != before + queries or not padding.all()):
        return None
    return before, queries


def forget(name: str) -> None:
    """Take back what `register` did."""
    # What is set on the interfaces' shared instances, which `del` would take back, the making of masks
    # does not look at.
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(name, None)


def registered() -> dict[str, list[str]]:
    """Names of all attention functions and mask functions there are."""
    return {
        "attention functions": sorted(ALL_ATTENTION_FUNCTIONS),
        "mask functions": sorted(ALL_MASK_ATTENTION_FUNCTIONS),
    }


def implementation(config: Any) -> Any:
    """The attention that a configuration names, or the choice for each of its parts."""
    return config._attn_implementation


def restore(config: Any, name: Any) -> None:
    """Set the attention that a configuration names, without those of its parts."""
    config._attn_implementation = {"": name}


def configurations(model: nn.Module) -> Iterator[Any]:
    """Every configuration of the model and its parts."""
    seen: set[int] = set()
    queue = [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    while queue:
        config = queue.pop(0)
        if id(config) in seen:
            continue
        seen.add(id(config))
        children = [getattr(config, name, None) for name in config.sub_configs]
        queue += [child for child in children if child is not None]
        yield config


@contextmanager
def plainly(model: nn.Module) -> Iterator[None]:
    """Name a model's attention by a plain string for a while: a constant, to a compiler."""
    told = ((config, implementation(config)) for config in configurations(model))
    names = [(config, name) for config, name in told if isinstance(name, Attached)]
    for config, name in names:
        restore(config, str(name))
    try:
        yield
    finally:
        for config, name in names:
            restore(config, name)


def checkpointing(module: nn.Module) -> Any:
    """The function by which a block is computed with checkpoints; None where there is none."""
    return module.__dict__.get("_gradient_checkpointing_func")


def set_checkpointing(module: nn.Module, function: Any) -> None:
    """Compute a block with checkpoints in another way."""
    module.__dict__["_gradient_checkpointing_func"] = function


def _same(name: Any) -> Any:
    return name
