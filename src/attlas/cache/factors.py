"""LRQK's algebra: factors of a prompt from its Gram matrices, and codes of a later token.

The small systems are solved in float64 with a ridge of 10⁻¹² of the diagonal, which changes no digit
that is kept and gives prompts of fewer tokens than the rank, whose systems are singular, an answer.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1e-12
#: Keeps the step of the gradient finite where a code fits exactly.
EPSILON = 1e-6


def factorised(
    gram_q: Float[Tensor, "batch heads dim dim"],
    gram_k: Float[Tensor, "batch heads dim dim"],
    sizes: Float[Tensor, "batch heads dim"],
    rank: int,
    sweeps: int,
) -> tuple[
    Float[Tensor, "batch heads dim rank"], Float[Tensor, "batch heads rank dim"],
    Float[Tensor, "batch heads dim rank"], Float[Tensor, "batch heads rank dim"],
]:  # fmt: skip
    """(M_Q, B_Q, M_K, B_K) in float64, with A_Q = Q M_Q and A_K = K M_K.

    Args:
        gram_q: QᵀQ.
        gram_k: KᵀK.
        sizes: Σ |Q| + |K| of each channel; the factors begin as the largest channels.
        rank: channels of A.
        sweeps: over A_Q and A_K.
    """
    gram_q, gram_k = gram_q.double(), gram_k.double()
    channels = sizes.topk(rank, dim=-1).indices
    m_q = torch.nn.functional.one_hot(channels, sizes.shape[-1]).mT.double()
    m_k = m_q
    for _ in range(sweeps):
        b_q, b_k = _fit(gram_q, m_q), _fit(gram_k, m_k)
        m_q = _right(m_k.mT @ gram_k @ m_k + b_q @ b_q.mT, gram_k @ m_k + b_q.mT)
        m_k = _right(m_q.mT @ gram_q @ m_q + b_k @ b_k.mT, gram_q @ m_q + b_k.mT)
    return m_q, _fit(gram_q, m_q), m_k, _fit(gram_k, m_k)


def decoded(
    q: Float[Tensor, "batch heads 1 dim"],
    k: Float[Tensor, "batch heads 1 dim"],
    b_q: Float[Tensor, "batch heads rank dim"],
    b_k: Float[Tensor, "batch heads rank dim"],
    pull: Float[Tensor, "batch heads 1 rank"],
    gram: Float[Tensor, "batch heads rank rank"],
    refinements: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q̂, k̂, B_Q, B_K) of one more token, in the type of q.

    Args:
        q: its query.
        k: its key.
        b_q: the queries' basis so far.
        b_k: the keys'.
        pull: q K_Ωᵀ A_Ω over the tokens at hand.
        gram: A_Ωᵀ A_Ω.
        refinements: of both codes.
    """
    dtype = q.dtype
    q, k, b_q, b_k, pull, gram = (x.double() for x in (q, k, b_q, b_k, pull, gram))
    product = q @ k.mT
    of_q, of_k = q @ b_q.mT + pull, k @ b_k.mT
    within_q, within_k = b_q @ b_q.mT + gram, b_k @ b_k.mT
    k_hat = _right(within_k, of_k)
    for _ in range(refinements):
        q_hat = _right(within_q + k_hat.mT @ k_hat, of_q + product @ k_hat)
        k_hat = _right(within_k + q_hat.mT @ q_hat, of_k + product @ q_hat)
    found = (q_hat, k_hat, _stepped(b_q, q_hat, q), _stepped(b_k, k_hat, k))
    q_hat, k_hat, b_q, b_k = (x.to(dtype) for x in found)
    return q_hat, k_hat, b_q, b_k


def coded(
    k: Float[Tensor, "batch heads tokens dim"], b_k: Float[Tensor, "batch heads rank dim"]
) -> Float[Tensor, "batch heads tokens rank"]:
    """Codes of keys in a basis that stays: the least squares of k ≈ k̂ B_K."""
    basis = b_k.double()
    codes: Tensor = _right(basis @ basis.mT, k.double() @ basis.mT)
    return codes.to(k.dtype)


def _fit(gram: Tensor, m: Tensor) -> Tensor:
    """B = (Aᵀ A)⁻¹ Aᵀ X for A = X M and gram = Xᵀ X."""
    fitted: Tensor = torch.linalg.solve_ex(_ridged(m.mT @ gram @ m), m.mT @ gram)[0]
    return fitted


def _right(a: Tensor, b: Tensor) -> Tensor:
    """b a⁻¹."""
    solved: Tensor = torch.linalg.solve_ex(_ridged(a), b, left=False)[0]
    return solved


def _ridged(a: Tensor) -> Tensor:
    mean = a.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    one = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return a + (RIDGE * mean + torch.finfo(a.dtype).tiny) * one


def _stepped(b: Tensor, code: Tensor, x: Tensor) -> Tensor:
    """The basis after one step down the gradient of |code B − x|², of the length that is best."""
    slope = code.mT @ (code @ b - x)
    size = slope.square().sum((-2, -1), keepdim=True)
    return b - size / ((code @ slope).square().sum((-2, -1), keepdim=True) + EPSILON) * slope
