"""How attlas takes hold of a model's attention, and lets go.

Two private names are left here. `_attn_implementation`: of a configuration, since no public name tells
which implementation is set, and `set_attn_implementation` cannot set one configuration alone, so that a
model with parts of several could not be put back. `_global_mapping`: of the two interfaces, which have a
public `register` and nothing to take an entry back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

__all__ = [
    "PreTrainedModel",
    "forget",
    "implementation",
    "register",
    "registered",
    "restore",
    "sdpa_attention_forward",
]


def register(name: str, function: Callable[..., Any]) -> None:
    """An attention function under a name, with SDPA's masks.

    Both are registered together: with the function alone Transformers would give no mask at all, and
    padding and causality would be lost silently.
    """
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


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
    """Set the attention that a configuration names, and those of its parts with it."""
    config._attn_implementation = name
