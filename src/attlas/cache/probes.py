"""Probe queries: one query for a window, shaped by the tokens whose activations are unusual.

    b_t = mean over channels of (q_t − m)² / (s + s̄/100)         p = Σ_t b_t q_t / Σ_t b_t

with m, s the running mean and variance of queries (see `actqkv`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Running(NamedTuple):
    """Mean and variance of queries, by channel, over the windows so far.

    Attributes:
        mean: [batch, channels].
        var: likewise.
        windows: how many, [batch].
    """

    mean: Float[Tensor, "batch channels"]
    var: Float[Tensor, "batch channels"]
    windows: Int[Tensor, " batch"]

    @classmethod
    def empty(cls, like: Float[Tensor, "batch tokens channels"]) -> Running:
        """Of no window."""
        zero = like.new_zeros(like.shape[0], like.shape[2], dtype=torch.float32)
        return cls(zero, zero, torch.zeros(like.shape[0], dtype=torch.int64, device=like.device))


def probe(
    q: Float[Tensor, "batch tokens channels"],
    there: Bool[Tensor, "batch tokens"],
    running: Running,
    horizon: int,
) -> tuple[Float[Tensor, "batch channels"], Float[Tensor, "batch tokens"], Running]:
    """(probe query, weights of the tokens, statistics with this window).

    Args:
        q: a window's queries, all heads side by side.
        there: which of them are tokens; a row without any changes nothing.
        running: statistics of the windows before.
        horizon: windows over which they run, and until which the weights are uniform.
    """
    q, valid = q.float(), there[..., None].float()
    count = valid.sum(1)  # [batch, 1]
    w = count.clamp(min=1)
    mean = (q * valid).sum(1) / w
    var = ((q - mean[:, None]).square() * valid).sum(1) / w
    n = running.windows.clamp(min=1, max=horizon)[:, None].float()
    spread = running.var * (n - 1 / w) + var + (mean - running.mean).square() / (1 + 1 / n)
    began, some = running.windows[:, None] > 0, count > 0
    fresh = Running(
        torch.where(began, (running.mean * n + mean) / (n + 1), mean),
        torch.where(began, spread / (n + 1 - 1 / w), var * w / (w - 1).clamp(min=1)),
        running.windows + some[:, 0],
    )
    floor = fresh.var.mean(-1, keepdim=True) / 100
    scaled = (q - fresh.mean[:, None]).square() / (fresh.var + floor)[:, None]
    bias = scaled.nan_to_num().mean(-1) * valid[..., 0]
    total = bias.sum(1, keepdim=True)
    biased = (running.windows[:, None] > horizon) & (total > 0)
    weights = torch.where(biased, bias / total.clamp(min=1e-30), valid[..., 0] / w)
    kept = Running(*(torch.where(some if a.ndim > 1 else some[:, 0], a, b)
                     for a, b in zip(fresh, running, strict=True)))  # fmt: skip
    return torch.einsum("bt,btc->bc", weights, q), weights, kept


def page_cosines(
    asked: Float[Tensor, "batch heads dim"], pages: Float[Tensor, "batch kv_heads pages dim"]
) -> Float[Tensor, "batch pages"]:
    """cos of a probe, all heads side by side, with each page's key repeated for the heads of a group."""
    groups = asked.shape[1] // pages.shape[1]
    summed = asked.float().unflatten(1, (pages.shape[1], groups)).sum(2)
    products = torch.einsum("bhd,bhpd->bp", summed, pages.float())
    sizes = (groups * pages.float().square().sum((1, 3))).sqrt() * asked.float().flatten(1).norm(
        dim=1, keepdim=True
    )
    cosines: Tensor = products / sizes.clamp(min=1e-24)
    return cosines
