"""The forms of `ops.recurrence`: step by step, and in chunks.

Within a chunk, with G_t the sum of its log decays up to t and u_t = S_{t−1}ᵀ b_t,

    S_t = e^{G_t} S_0 + Σ_{s≤t} e^{G_t − G_s} (a_s u_sᵀ + k_s v_sᵀ)
    (I − ⟨b, a⟩) U = (b e^{G − g}) S_0 + ⟨b, k⟩ V            ⟨x, y⟩_ts = Σ_d x_td y_sd e^{…G_td − G_sd}
    Y = (q e^G) S_0 + ⟨q, k⟩ V + ⟨q, a⟩ U

⟨b, ·⟩ is strictly lower triangular and taken with G_{t−1}, ⟨q, ·⟩ has its diagonal. Only differences
G_t − G_s ≤ 0 are ever exponentiated: of channels that decay each by themselves, a block of rows takes
the decays from its first token on, a block of columns those up to there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from math import inf

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from attlas.tracing import any_length

#: Rows and columns that share a reference point, where channels have decays of their own.
BLOCK = 16
#: Log decay that is nothing in float64 too; sums of it stay numbers.
LEAST = -800.0


@dataclass(frozen=True)
class Terms:
    """What a recurrence is made of, [batch, heads, tokens, …]; g of one channel or all."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None

    def part(self, start: int, stop: int) -> Terms:
        """Some tokens."""
        return self._map(lambda x: x[:, :, start:stop])

    def flipped(self) -> Terms:
        """The last token first."""
        return self._map(lambda x: x.flip(2))

    def chunks(self, size: int) -> Terms:
        """[batch, heads, chunks, size, …], the last filled up with what changes nothing."""
        short = -self.q.shape[2] % size
        return self._map(lambda x: pad(x, (0, 0, 0, short)).unflatten(2, (-1, size)))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Terms:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: change(x) for n, x in values.items() if x is not None})


def stepped(
    terms: Terms, state: Float[Tensor, "batch heads dim v_dim"]
) -> tuple[Float[Tensor, "batch heads tokens v_dim"], Float[Tensor, "batch heads dim v_dim"]]:
    """The definition, token by token."""
    tokens = terms.q.shape[2]
    if tokens == 1:
        return _step(terms, state)
    found = []
    for t in range(tokens):
        out, state = _step(terms.part(t, t + 1), state)
        found.append(out)
    return torch.cat(found, dim=2) if found else terms.v, state


def _step(one: Terms, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token."""
    after = state if one.g is None else state * one.g.exp().to(state.dtype).mT
    if one.a is not None and one.b is not None:
        after = torch.addcmul(after, one.a.mT, one.b @ state)
    after = torch.addcmul(after, one.k.mT, one.v)
    return one.q @ after, after


def chunked(
    terms: Terms, state: Float[Tensor, "batch heads dim v_dim"], size: int
) -> tuple[Float[Tensor, "batch heads tokens v_dim"], Float[Tensor, "batch heads dim v_dim"]]:
    """Products within chunks, the state from one to the next."""
    tokens = terms.q.shape[2]
    c = terms.chunks(size)
    g = None if c.g is None else c.g.clamp(min=LEAST)
    whole = None if g is None else g.cumsum(3)
    before = None if whole is None or g is None else whole - g
    within = paired(c.q, c.k, whole, whole, 0)
    asked, left = faded(c.q, whole), faded(c.k, remaining(whole))
    fixed, solved, known = within @ c.v, None, None
    if c.a is not None and c.b is not None:
        seen = paired(c.q, c.a, whole, whole, 0)
        inner = paired(c.b, c.a, before, whole, -1)
        right = torch.cat([faded(c.b, before), paired(c.b, c.k, before, whole, -1) @ c.v], dim=-1)
        eye = torch.eye(size, dtype=inner.dtype, device=inner.device)
        both = torch.linalg.solve_triangular(eye - inner, right, upper=False, unitriangular=True)
        solved, known = both.split([c.q.shape[-1], c.v.shape[-1]], dim=-1)
        # What U adds to outputs is known but for its part that is linear in the state.
        fixed, asked = fixed + seen @ known, asked + seen @ solved
        ending = faded(c.a, remaining(whole))
    found = []
    for n in range(c.q.shape[2]):
        found.append(fixed[:, :, n] + asked[:, :, n] @ state)
        added = left[:, :, n].mT @ c.v[:, :, n]
        if solved is not None and known is not None:
            added = added + ending[:, :, n].mT @ (known[:, :, n] + solved[:, :, n] @ state)
        if whole is not None:
            state = state * whole[:, :, n, -1].exp().to(state.dtype)[..., None]
        state = state + added
    out = torch.stack(found, dim=2).flatten(2, 3)[:, :, :tokens] if found else terms.v
    return out, state


def remaining(whole: Tensor | None) -> Tensor | None:
    """Log decay from behind each token to the end of its chunk."""
    return None if whole is None else whole[..., -1:, :] - whole


def faded(x: Tensor, g: Tensor | None) -> Tensor:
    """x decayed by g."""
    return x if g is None else x * g.exp().to(x.dtype)


def paired(
    x: Float[Tensor, "*rows size dim"], y: Float[Tensor, "*rows size dim"],
    until: Tensor | None, since: Tensor | None, diagonal: int,
) -> Float[Tensor, "*rows size size"]:  # fmt: skip
    """⟨x, y⟩_ts = Σ_d x_td y_sd e^{until_td − since_sd} below the diagonal or on it, else 0."""
    size = x.shape[-2]
    if until is None or since is None:
        return (x @ y.mT).tril(diagonal)
    if until.shape[-1] == 1:
        shape = torch.ones(size, size, dtype=torch.bool, device=x.device).tril(diagonal)
        apart = (until - since.mT).masked_fill(~shape, -inf)
        return (x @ y.mT) * apart.exp().to(x.dtype)
    if any_length(size):
        return _paired_blocks(x, y, until, since, diagonal)
    rows = []
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        own = slice(start, stop)
        # Within a block, pair by pair; before it, from the sum up to its first token.
        shape = torch.ones(stop - start, stop - start, dtype=torch.bool, device=x.device)
        apart = until[..., own, None, :] - since[..., None, own, :]
        apart = apart.masked_fill(~shape.tril(diagonal)[..., None], -inf).exp().to(x.dtype)
        near = torch.einsum("...td,...sd,...tsd->...ts", x[..., own, :], y[..., own, :], apart)
        parts = [near, near.new_zeros(*near.shape[:-1], size - stop)]
        if start:
            from_here = since[..., start - 1 : start, :]
            rest = faded(x[..., own, :], until[..., own, :] - from_here)
            parts.insert(0, rest @ faded(y[..., :start, :], from_here - since[..., :start, :]).mT)
        rows.append(torch.cat(parts, dim=-1))
    return torch.cat(rows, dim=-2)


def _paired_blocks(
    x: Tensor, y: Tensor, until: Tensor, since: Tensor, diagonal: int
) -> Float[Tensor, "*rows size size"]:
    """`paired` of channels that decay each by themselves, all blocks of rows at once."""
    size = x.shape[-2]
    blocks = size // BLOCK + 2  # two at least, since one would be a program for one alone
    x, until, own_y, own_since = (
        pad(t, (0, 0, 0, blocks * BLOCK - size)).unflatten(-2, (blocks, BLOCK))
        for t in (x, until, y, since)
    )
    shape = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=x.device).tril(diagonal)
    apart = until[..., :, None, :] - own_since[..., None, :, :]
    apart = apart.masked_fill(~shape[..., None], -inf).exp().to(x.dtype)
    near = torch.einsum("...td,...sd,...tsd->...ts", x, own_y, apart)
    # From the last token before each block, 0 before the first.
    start = torch.arange(blocks, device=x.device) * BLOCK
    from_here = pad(since, (0, 0, 1, 0))[..., start.clamp(max=size), :]
    earlier = torch.arange(size, device=x.device) < start[:, None]
    gone = (from_here[..., :, None, :] - since[..., None, :, :]).masked_fill(~earlier[..., None], -inf)
    rest = faded(x, until - from_here[..., :, None, :]) @ faded(y[..., None, :, :], gone).mT
    place = torch.arange(size, device=x.device) - start[:, None]  # of each column in a block of rows
    inside = (place >= 0) & (place < BLOCK)
    index = place.clamp(0, BLOCK - 1)[:, None, :].expand(*near.shape[:-1], -1)
    both = rest + near.gather(-1, index).masked_fill(~inside[:, None, :], 0.0)
    return both.flatten(-3, -2)[..., :size, :]
