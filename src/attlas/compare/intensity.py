"""How many FLOP a decoded token does for each byte it reads, layer by layer.

    attention   what one query a sequence does with its cache of `length` tokens; the cache is read once
                heads, kv_heads of width d:  4 · heads · d · n FLOP,   2 · kv_heads · d · n numbers
                latent L, rotary R, absorbed:  2 · heads · (2 L + R) · n FLOP,   (L + R) · n numbers
    experts     6 · dim · width FLOP for each token and active expert; an expert's three matrices are
                read once if any of the batch's tokens takes it: E (1 − (1 − active/E)^batch) of E

Projections around the cache are left out, as are queries and activations: both are small beside what is
counted. A machine whose ridge (peak FLOP/s over bytes/s) lies above a layer's FLOP/byte waits for memory.

Source: "The New LLM Bottleneck: A Systems Perspective on Latent Attention and Mixture-of-Experts". Tokens
choose experts evenly and independently here.
"""

from __future__ import annotations

from typing import NamedTuple

from attlas.errors import UserError


class Work(NamedTuple):
    """What a decode step of one layer costs."""

    flops: int | float
    bytes: int | float

    @property
    def intensity(self) -> float:
        """FLOP for each byte."""
        return self.flops / self.bytes


def grouped(
    *, heads: int, kv_heads: int, head_dim: int, length: int, batch: int = 1, dtype_bytes: int = 2
) -> Work:
    """Multi-head (kv_heads = heads), grouped and multi-query (kv_heads = 1) attention.

    Raises:
        UserError: a size below 1, or kv_heads that do not divide heads.
    """
    positive(heads=heads, kv_heads=kv_heads, head_dim=head_dim, length=length, batch=batch,
             dtype_bytes=dtype_bytes)  # fmt: skip
    if heads % kv_heads:
        raise UserError(f"kv_heads must divide heads={heads}, got {kv_heads}")
    tokens = batch * length
    return Work(4 * heads * head_dim * tokens, 2 * kv_heads * head_dim * tokens * dtype_bytes)


def latent(
    *, heads: int, latent: int, rotary: int, length: int, batch: int = 1, dtype_bytes: int = 2
) -> Work:
    """Latent attention in its absorbed form.

    Raises:
        UserError: a size below 1; below 0 for `rotary`.
    """
    positive(heads=heads, latent=latent, length=length, batch=batch, dtype_bytes=dtype_bytes)
    if rotary < 0:
        raise UserError(f"rotary must be at least 0, got {rotary}")
    tokens = batch * length
    return Work(2 * heads * (2 * latent + rotary) * tokens, (latent + rotary) * tokens * dtype_bytes)


def experts(
    *, experts: int, active: int, dim: int, width: int, batch: int = 1, dtype_bytes: int = 2
) -> Work:
    """A mixture of gated experts, of which each token of the batch takes `active`.

    Raises:
        UserError: a size below 1, or more active experts than there are.
    """
    positive(experts=experts, active=active, dim=dim, width=width, batch=batch,
             dtype_bytes=dtype_bytes)  # fmt: skip
    if active > experts:
        raise UserError(f"active must be at most experts={experts}, got {active}")
    read = experts * (1 - (1 - active / experts) ** batch)
    weights = 3 * dim * width
    return Work(2 * weights * active * batch, weights * read * dtype_bytes)


def positive(**sizes: int | float) -> None:
    """Each of the sizes is above 0.

    Raises:
        UserError: otherwise, naming it.
    """
    for name, size in sizes.items():
        if not size > 0:
            raise UserError(f"{name} must be above 0, got {size}")
