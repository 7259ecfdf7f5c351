"""Attention of many heads to one latent a token, which is its key and its value at once.

    s = (content · latent + rotated · rotary) · scale        tokens = [latent | rotary]
    out = softmax(s, hidden pairs at −∞) · latent

The plain form multiplies twice with the tokens, and so reads them twice; on a GPU a few queries go
through a kernel that reads them once (see `attlas.kernels.latent_decode`).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attlas.masks import Mask, causal, hides_nothing
from attlas.ops.decode_kernels import has_kernels
from attlas.ops.reference import as_dense, grouped_product, softmax

#: Queries, and widths of a latent, that the kernel takes.
FEW = 8
WIDTHS = (64, 128, 256, 512)


def latent_attend(
    content: Float[Tensor, "batch heads queries latent"],
    rotated: Float[Tensor, "batch heads queries rotary"],
    tokens: Float[Tensor, "batch 1 keys width"],
    *,
    scale: float,
    mask: Mask | Bool[Tensor, "b h queries keys"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads queries latent"]:
    """Latents summed by each head's weights; the last query stands at the last token.

    Args:
        content: the part of the queries that meets the latents.
        rotated: the part that meets the rotary keys.
        tokens: each token's latent, then its rotary key.
        scale: of the products.
        mask: a pattern, or booleans that broadcast to [batch, heads, queries, keys], True visible.
        dropout: share of weights dropped.

    Raises:
        ValueError: tokens that are not as wide as both parts of the queries.
    """
    latent, queries, keys = content.shape[-1], content.shape[2], tokens.shape[2]
    if tokens.shape[-1] != latent + rotated.shape[-1]:
        raise ValueError(
            f"tokens must be {latent} + {rotated.shape[-1]} wide, got {tokens.shape[-1]}"
        )
    # What each sequence's padding hides stands on the device, for which nothing here may wait.
    pattern = mask if isinstance(mask, Mask) and mask.batch is None else None
    if pattern is not None and hides_nothing(pattern, queries, keys, keys - queries):
        mask = None
    if dropout == 0 and kernel_takes(content, rotated, tokens):
        from attlas.kernels.latent_decode import latent_decode

        flag = isinstance(mask, Mask) and mask == causal
        visible = None if flag else as_dense(mask, queries, keys, keys - queries, content.device)
        return latent_decode(content, rotated, tokens, scale=scale, causal=flag, visible=visible)
    return plain(content, rotated, tokens, scale=scale, mask=mask, dropout=dropout)


def plain(
    content: Tensor, rotated: Tensor, tokens: Tensor, *, scale: float,
    mask: Mask | Tensor | None = None, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """The definition, with all scores in memory."""
    queries, keys = content.shape[2], tokens.shape[2]
    scores = grouped_product(torch.cat((content, rotated), dim=-1) * scale, tokens.mT)
    visible = as_dense(mask, queries, keys, keys - queries, content.device)
    weights = softmax(scores if visible is None else scores.masked_fill(~visible, -torch.inf))
    weights = torch.dropout(weights, dropout, dropout > 0)
    return grouped_product(weights, tokens[..., : content.shape[-1]])


def kernel_takes(content: Tensor, rotated: Tensor, tokens: Tensor) -> bool:
    """Whether a call may go through the kernel, which has no gradient."""
    parts = (content, rotated, tokens)
    return (
        content.is_cuda
        and content.shape[2] <= FEW
        and content.shape[1] <= 128
        and content.shape[-1] in WIDTHS
        and rotated.shape[-1] <= 128
        and content.dtype
        in (torch.bfloat16, torch.float16)  # its float32 is coarser than PyTorch's
        and content.dtype == rotated.dtype == tokens.dtype
        and tokens.stride(-1) == 1
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in parts))
        and not torch.compiler.is_compiling()
        and has_kernels(content.device)
    )
