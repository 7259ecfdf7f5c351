"""Damped moving averages of many numbers a channel, by FFT and step by step.

    h_t = α ⊙ (β x_t) + (1 − α ⊙ δ) ⊙ h_{t−1}        y_t = η · h_t / √size        SiLU(y + ω ⊙ x)

α = sigmoid(alpha) and δ = sigmoid(delta), so that every number of the state decays. What the average
gives is a convolution with K_t = Σ η/√size · αβ (1 − αδ)^t, and so a product of Fourier transforms.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import silu

from attlas.bases.packing import at_places, place, ranks
from attlas.ops.exact import exact
from attlas.tracing import any_length

#: Calls shorter than this are made step by step.
SHORT = 4


class DampedEMA(nn.Module):
    """A damped moving average of every channel, with `size` values each.

    Args:
        dim: channels.
        size: values a channel.
        both_ways: whether a second average, with parameters of its own, runs backwards.
    """

    def __init__(self, dim: int, size: int = 16, *, both_ways: bool = False) -> None:
        super().__init__()
        rows = 2 * dim if both_ways else dim
        sign = (-1.0) ** torch.arange(size)
        self.alpha, self.delta = (nn.Parameter(0.2 * torch.randn(rows, size)) for _ in range(2))
        self.beta = nn.Parameter(sign + 0.02 * torch.randn(rows, size))
        self.eta = nn.Parameter(torch.randn(rows, size))
        self.omega = nn.Parameter(torch.randn(dim))
        self.both_ways = both_ways

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: Float[Tensor, "batch dim size"] | None = None,
        form: Literal["auto", "fft", "step"] = "auto",
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch dim size"] | None]:
        """(SiLU(average + ω ⊙ x), h behind the last token); no h where a second one runs backwards.

        Args:
            x: what is averaged.
            valid: which tokens count; the others change nothing.
            state: h before the first token; zeros unless given.
            form: by "fft", "step" by step, or the latter for a few tokens alone.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        terms = [
            t.to(wide) for t in (self.alpha.sigmoid(), self.delta.sigmoid(), self.beta, self.eta)
        ]
        alpha, delta, beta, eta = terms
        kept, written, read = 1 - alpha * delta, alpha * beta, eta * eta.shape[-1] ** -0.5
        given = x.to(wide)
        if self.both_ways:
            y = _both_ways(given, valid, kept, written * read)
        else:
            if state is None:
                state = given.new_zeros(len(x), *kept.shape)
            auto = form == "auto" and not any_length(x.shape[1])
            short = form == "step" or (auto and x.shape[1] < SHORT)
            y, state = (_steps if short else _fft)(given, valid, kept, written, read, state)
        return silu(y.to(x.dtype) + self.omega * x), state


def _steps(
    x: Tensor, valid: Tensor | None, kept: Tensor, written: Tensor, read: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    found = []
    for t in range(x.shape[1]):
        after = kept * h + written * x[:, t, :, None]
        h = after if valid is None else after.where(valid[:, t, None, None], h)
        found.append((h * read).sum(-1))
    return torch.stack(found, dim=1) if found else x, h


@exact
def _fft(
    x: Tensor, valid: Tensor | None, kept: Tensor, written: Tensor, read: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    tokens, at = x.shape[1], None if valid is None else ranks(valid)
    powers = kept[..., None] ** torch.arange(tokens + 1, device=x.device)
    now = x if at is None else place(x, at, torch.zeros_like(x))
    kernel = torch.einsum("dnt,dn->dt", powers[..., :-1], written * read)
    y = _convolved(now, kernel) + torch.einsum("bdn,dnt->btd", h * read, powers[..., 1:])
    if at is None or valid is None:
        last, old = now, powers[..., -1] * h
    else:  # the valid tokens at the end, where the newest one is not decayed
        count = valid.sum(-1, keepdim=True)
        last = place(x, at.where(at < 0, at + tokens - count), torch.zeros_like(x))
        y, old = at_places(y, at), kept ** count[..., None] * h
    return y, old + torch.einsum("btd,dnt->bdn", last, powers[..., :-1].flip(-1)) * written


@exact
def _both_ways(x: Tensor, valid: Tensor | None, kept: Tensor, factors: Tensor) -> Tensor:
    at = None if valid is None else ranks(valid)
    now = x if at is None else place(x, at, torch.zeros_like(x))
    powers = kept[..., None] ** torch.arange(x.shape[1], device=x.device)
    ahead, back = torch.einsum("dnt,dn->dt", powers, factors).chunk(2)
    y = _convolved(now, ahead) + _convolved(now.flip(1), back).flip(1)
    return y if at is None else at_places(y, at)


def _convolved(x: Float[Tensor, "b t d"], kernel: Float[Tensor, "d t"]) -> Float[Tensor, "b t d"]:
    tokens = x.shape[1]
    if len(x) == 0:  # of which an FFT makes an error
        return x
    product = torch.fft.rfft(x, n=2 * tokens, dim=1) * torch.fft.rfft(kernel, n=2 * tokens).mT
    y: Tensor = torch.fft.irfft(product, n=2 * tokens, dim=1)
    return y[:, :tokens]
