"""Losses that add up: over the steps of gradient accumulation they give what one batch would.

    loss = Σ losses / n,   n = items of all the steps, as Trainer tells in `num_items_in_batch`

Without that number, n is the items of this pass, and the loss a mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attlas.attention import Attention
from attlas.errors import UserError
from attlas.kinds.feature_map import FeatureMap

#: Marks labels that are none.
IGNORED = -100
PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")

Count = Tensor | int | None


def token_loss(
    logits: Tensor, labels: Tensor, model: nn.Module, num_items_in_batch: Count = None
) -> Tensor:
    """Cross-entropy of every label that is not −100, and what the layers add in training."""
    flat, wanted = logits.flatten(0, -2).float(), labels.flatten().to(logits.device)
    loss = F.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum")
    return with_auxiliary(loss / _count(wanted, num_items_in_batch), model, labels, num_items_in_batch)


def class_loss(
    logits: Tensor, labels: Tensor, model: Any, num_items_in_batch: Count = None
) -> Tensor:
    """The loss of a classifier by `config.problem_type`, which is told from the labels where it is None.

    One output is a regression, whole numbers are classes, and anything else is several labels at once.

    Raises:
        ValueError: another problem type, or labels of another shape than it takes.
    """
    config, logits, labels = model.config, logits.float(), labels.to(logits.device)
    if config.problem_type is None:
        whole = not labels.is_floating_point() and labels.dtype is not torch.bool
        config.problem_type = PROBLEMS[0 if config.num_labels == 1 else 1 if whole else 2]
    if config.problem_type == PROBLEMS[1]:
        return token_loss(logits, labels.flatten(), model, num_items_in_batch)
    if config.problem_type not in PROBLEMS:
        raise UserError(f"problem_type must be one of {PROBLEMS}, got {config.problem_type!r}")
    shaped = labels[..., None] if config.num_labels == 1 and labels.ndim == 1 else labels
    if shaped.shape != logits.shape:
        raise UserError(
            f"labels must be [batch, num_labels] = {list(logits.shape)} for "
            f"problem_type={config.problem_type!r}, got {list(labels.shape)}"
        )
    compare: Any = (
        F.mse_loss if config.problem_type == PROBLEMS[0] else F.binary_cross_entropy_with_logits
    )
    total = compare(logits, shaped.to(logits.dtype), reduction="sum")
    count = labels.numel() if num_items_in_batch is None else num_items_in_batch
    return with_auxiliary(total / _on(count, total), model, labels, num_items_in_batch)


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """What the layers add to the loss: the sum of their last pass's."""
    found = (m.auxiliary_loss for m in model.modules() if isinstance(m, (Attention, FeatureMap)))
    losses = [loss for loss in found if loss is not None]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum() if losses else None


def with_auxiliary(
    loss: Tensor, model: nn.Module, labels: Tensor, num_items_in_batch: Count = None
) -> Tensor:
    """The loss with that of the layers, while training, in the share that this pass has of all steps.

    Raises:
        ValueError: reentrant gradient checkpointing, which would lose that loss's gradient.
    """
    extra = auxiliary_loss(model) if model.training else None
    if extra is None:
        return loss
    if loss.requires_grad and not extra.requires_grad:
        raise ValueError(
            "use_reentrant=True in gradient checkpointing cuts the layers' auxiliary loss off from "
            "their weights; use use_reentrant=False"
        )
    if num_items_in_batch is not None:
        extra = extra * (labels != IGNORED).sum().to(extra.device) / _on(num_items_in_batch, extra)
    return loss + extra.to(loss.device)


def _count(labels: Tensor, given: Count) -> Tensor | int:
    return (labels != IGNORED).sum() if given is None else _on(given, labels)


def _on(count: Tensor | int, like: Tensor) -> Tensor | int:
    return count.to(like.device) if isinstance(count, Tensor) else count
