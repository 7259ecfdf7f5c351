"""What analyses of pictures share: classes that are explained, maps of tokens, maps made comparable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from attlas.attach.stream import blocks
from attlas.errors import UserError
from attlas.inspect.subject import Subject


def logits_of(subject: Subject) -> Float[Tensor, "rows classes"]:
    """The logits of a classifier for the pictures.

    Raises:
        ValueError: a model that gives none.
    """
    out = subject.forward()
    logits: Tensor | None = getattr(out, "logits", None)
    if logits is None or logits.ndim != 2:
        raise UserError(
            f"{type(subject.model).__name__} gives no logits of classes, so there is nothing to explain; "
            "take a classifier, such as attlas.ViT or attlas.ConvNet"
        )
    return logits


def targets_of(subject: Subject, logits: Float[Tensor, "rows classes"]) -> Int[Tensor, " rows"]:
    """The class of each picture that is explained: its label, or the likeliest where none is given.

    Raises:
        ValueError: labels that are no class of the model.
    """
    if subject.labels is None:
        return logits.argmax(dim=-1)
    labels = subject.labels.to(logits.device)
    rows, classes = logits.shape
    if labels.shape != (rows,) or bool((labels < 0).any() | (labels >= classes).any()):
        raise UserError(
            f"labels must be {rows} numbers of classes below {classes}, got {labels.tolist()}"
        )
    return labels


def feature_names(model: nn.Module) -> list[str]:
    """Names of the modules whose outputs are looked at unless others are named.

    The last block of each stage of a convolutional network of ours; all blocks of a transformer.

    Raises:
        ValueError: neither is known of this model.
    """
    stages = getattr(getattr(model, "model", model), "stages", None)
    if isinstance(stages, nn.ModuleList):
        found = [list(stage.children())[-1] for stage in stages]
    else:
        found = [block for _, block in blocks(model)]
    names = {module: name for name, module in model.named_modules()}
    if not found:
        raise UserError(f"{type(model).__name__} has no blocks that are known; name modules by features=")
    return [names[module] for module in found]


@contextmanager
def outputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What modules give, by their names, of the last call in the block.

    Raises:
        ValueError: a name that is no module's.
    """
    modules = dict(model.named_modules())
    if unknown := [name for name in names if name not in modules]:
        raise UserError(f"{type(model).__name__} has no module {unknown[0]!r}; see model.named_modules()")
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, given: Any, out: Any) -> None:
            kept[name] = out[0] if isinstance(out, tuple) else out

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in names]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def as_map(
    x: Float[Tensor, "rows ..."], subject: Subject
) -> Float[Tensor, "rows channels height width"]:
    """Features as a map: tokens [rows, tokens, channels] in rows of patches, without those before them.

    Raises:
        ValueError: features of another shape.
    """
    if x.ndim == 4:
        return x
    patch = getattr(subject.config, "patch_size", None)
    assert subject.pixel_values is not None
    if x.ndim != 3 or patch is None:
        raise UserError(
            f"features must be [rows, channels, height, width] or tokens, got {list(x.shape)}"
        )
    high, wide = (side // patch for side in subject.pixel_values.shape[-2:])
    if x.shape[1] < high * wide:
        raise UserError(f"{x.shape[1]} tokens do not hold {high} x {wide} patches")
    patches: Tensor = x[:, x.shape[1] - high * wide :].transpose(1, 2)
    return patches.reshape(*patches.shape[:2], high, wide)


def resized(
    maps: Float[Tensor, "rows height width"], size: Sequence[int]
) -> Float[Tensor, "rows tall broad"]:
    """Maps at another size, bilinear."""
    found: Tensor = F.interpolate(maps[:, None], size=tuple(size), mode="bilinear")
    return found[:, 0]


def from_0_to_1(maps: Float[Tensor, "rows height width"]) -> Float[Tensor, "rows height width"]:
    """Each map between 0 and 1; one of a single value is 0."""
    low = maps.amin(dim=(1, 2), keepdim=True)
    room = maps.amax(dim=(1, 2), keepdim=True) - low
    return torch.where(room > 0, (maps - low) / room, 0.0)
