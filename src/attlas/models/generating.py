"""What models that generate have in common: their caches, and what cannot be done with those."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attlas.attach.alone import steps_captured
from attlas.attention import Attention
from attlas.errors import UserError
from attlas.hf.caches import Cache
from attlas.hf.models import GenerationMixin


class AttlasGenerationMixin(GenerationMixin):  # type: ignore[misc]
    """Generation as in Transformers, on CUDA by captured steps; refusals of what would fail halfway."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; on CUDA by captured steps, see `attlas.attach`.

        Raises:
            ValueError: an assistant whose cache cannot be taken back; Transformers refuses that of the
                model itself.
        """
        assistant = kwargs.get("assistant_model")
        if assistant is not None and getattr(assistant, "_is_stateful", False):
            raise UserError(
                f"assistant_model: candidates cannot be taken back from the cache of "
                f"{type(assistant).__name__}, which remembers more than keys and values"
            )
        with steps_captured(self):
            return super().generate(*args, **kwargs)

    @staticmethod
    def create_masks_for_generate(
        attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor | None:
        """The mask as it is: [batch, keys] is what the layers take, with any cache."""
        return attention_mask


def is_stateful(layers: Iterable[nn.Module]) -> bool:
    """Whether the last tokens cannot be taken back from a cache of these layers."""
    return any(
        not module.supports.takes_back
        for layer in layers
        for module in layer.modules()
        if isinstance(module, Attention)
    )


def kept_cache(
    model: Any, given: Cache | None, wanted: bool, fresh: Callable[[], Cache]
) -> Cache | None:
    """The cache of a pass: what was given, or a fresh one where that is wanted.

    Raises:
        ValueError: one was given, and gradient checkpointing would write to it twice.
    """
    recomputes = model.training and model.gradient_checkpointing and torch.is_grad_enabled()
    if given is not None and recomputes:
        raise UserError(
            "cache cannot be given while gradient checkpointing recomputes the layers, which would "
            "write to it twice; call model.eval(), or give the whole text"
        )
    return fresh() if wanted and given is None and not recomputes else given
