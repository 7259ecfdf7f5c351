"""BalanceKV: half of the context stands for the whole of it, chosen so that sums hardly change.

Keys and values are taken in blocks of B tokens. In a block, with keys centred by its mean,

    K_ij = exp(τ·k_i·k_j/√d − β) · (v_i·v_j + 0.025)
    s_0  = +1;   s_i = +1 with probability 1/2 − γ·Σ_{j<i} K_ij s_j, else −1

so that the signed sum of the vectors behind K stays small: a walk that balances itself. One sign goes,
the other stays and counts double. Exactly half stay: of the sign that first reaches half of the
tokens no more is needed, and the tokens behind that point stay with weight 1. Done again on what is
left, weights multiplying and values weighted in K, two halved blocks make one new block, and so on:
a tree of merging and reducing. Attention adds log w to the scores of a token of weight w.

The walk's weights sum to nearly the number of tokens n; they are scaled by n/Σw of each head, so that
the balance between the tokens reduced and those that stay as they are is kept. The published code
divides by equal weights instead and uses the walk's in the numerator alone. The first and the newest
tokens stay as they are, as they do there.

Each token of a row walks by its own place: random numbers are drawn by block, place and head, not by row,
so that padding changes nothing. Cost: n·B products per key head and halving, in B dependent steps.
Keeps everything, hence reduces to full attention, at keep = 1.

Source: "Streaming Attention Approximation via Discrepancy Theory".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from attlas.attach.call import Call
from attlas.cache.mixed import taken_columns
from attlas.cache.part import CachePart, Role
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.options import option
from attlas.storage.layer import LayerState, StoredLayer, Taken
from attlas.storage.packed import PackedBody
from attlas.storage.rows import Rows

#: Added to the products of values, so that K stays positive where values are nearly orthogonal.
FLOOR = 0.025 + 1e-8
#: exp of more overflows float32 once summed; the sign of such a sum is beyond doubt anyway.
MOST = 70.0
#: Numbers of one halving: (iteration, blocks) -> [batch or 1, kv_heads, blocks, block].
Numbers = Callable[[int, int], Tensor]


@mechanism(
    "balancekv", aliases=("balance-kv",),
    example={"keep": 0.5, "sinks": 2, "recent": 4, "block": 8},
)  # fmt: skip
class BalanceKV(CachePart):
    """Halve the context by a self-balancing walk, once or several times, and weight what is left."""

    #: Weights are added to the scores of the pairs that stay.
    changes = ("mask", "score")
    beyond = ("mask: later queries do not meet the keys that were dropped",)
    role: ClassVar[Role] = "evict"
    comparable: ClassVar[tuple[str, ...]] = ("(keep=0.5)", "(keep=0.25)")

    keep: float = option(
        "share kept of the tokens between the sinks and the recent ones: 1, 1/2, 1/4, …",
        kw_only=False,
    )
    sinks: int = option("first tokens that stay as they are", default=32, at_least=0)
    recent: int = option(
        "newest tokens that stay as they are", default=32, at_least=0, former="window"
    )
    block: int = option("tokens that walk together", default=128, at_least=2)
    gamma: float = option("how strongly the walk balances itself", default=4.0, at_least=0)
    temperature: float = option("τ of the kernel", default=1.0)
    beta: float = option("β of the kernel", default=0.0)
    use_values: bool = option("take the values' products into the kernel", default=True)
    seed: int = option("decides the random numbers", default=0)
    while_decoding: bool = option(
        "also reduce what comes later, when block/keep tokens are no longer recent", default=False
    )

    def setup(self) -> None:
        """Count the halvings."""
        self.halvings = _halvings(self.keep)

    @property
    def rewinds(self) -> bool:
        """Whether nothing is reduced after the prompt."""
        return not self.while_decoding

    def compress(self, layer: StoredLayer, state: LayerState, rows: Rows) -> None:
        """Reduce all between the sinks and the recent tokens."""
        self._reduce(layer, state, rows, span=1)

    def later(self, layer: StoredLayer, state: LayerState, call: Call) -> None:
        """Reduce what is no longer recent, whole blocks of what will be kept at a time."""
        if self.while_decoding:
            self._reduce(layer, state, call.rows, span=self.block << self.halvings)

    def _reduce(self, layer: StoredLayer, state: LayerState, rows: Rows, span: int) -> None:
        """Turn the oldest dense tokens of each row into weighted ones, a multiple of `span`."""
        if not self.halvings:
            return
        held = layer.lengths(rows)
        before: list[int] = state.tensors["reduced"].tolist() if state.tensors else [0] * len(held)
        first = [0 if times else self.sinks for times in before]
        counts = [
            max(0, n - sinks - self.recent) // span * span
            for n, sinks in zip(held, first, strict=True)
        ]
        counts = [n if n > 1 else 0 for n in counts]  # one token cannot be halved
        if not max(counts):
            return
        first = [sinks if n else 0 for sinks, n in zip(first, counts, strict=True)]
        taken = layer.take([a + n for a, n in zip(first, counts, strict=True)], rows)
        numbers = self._numbers(state.layer, before, taken.k)
        layer.put("balanced", self._balanced(taken, first, counts, numbers))
        if self.while_decoding:
            times = [n + bool(count) for n, count in zip(before, counts, strict=True)]
            state.tensors["reduced"] = torch.tensor(times, device=taken.k.device)

    def _balanced(
        self, taken: Taken, first: list[int], counts: list[int], numbers: Numbers
    ) -> PackedBody:
        """The body of what is left of each row's tokens: `first` as they are, `counts` reduced."""
        device, shape = taken.k.device, taken.k.shape[:3]
        start, count = torch.tensor(first, device=device), torch.tensor(counts, device=device)
        place = torch.arange(shape[2], device=device)
        at = (start[:, None] + place[: max(counts)]).clamp(max=shape[2] - 1)[:, None]
        k, v = (_at(x, at.expand(*shape[:2], -1)) for x in (taken.k, taken.v))
        kept, walked = self.reduce(k, v, count, numbers)
        walked = walked * (count[:, None, None] / walked.sum(dim=-1, keepdim=True).clamp(min=1))
        weight = torch.zeros(shape, device=device)
        slot = (start[:, None, None] + kept).clamp(max=shape[2] - 1)
        weight.scatter_(2, slot, walked)
        weight.masked_fill_(place < start[:, None, None], 1.0)
        order = (weight == 0).long().sort(dim=-1, stable=True).indices
        order = order[..., : int((weight > 0).sum(dim=-1).max())]
        weight, columns = weight.gather(-1, order), taken_columns(taken).gather(-1, order)
        index = torch.where(weight > 0, columns, -1).to(torch.int32)
        bias = weight.log().masked_fill(weight == 0, 0.0)
        return PackedBody(_at(taken.k, order), _at(taken.v, order), index, bias=bias)

    def reduce(
        self,
        k: Float[Tensor, "batch kv_heads tokens dim"],
        v: Float[Tensor, "batch kv_heads tokens v_dim"],
        count: Int[Tensor, " batch"],
        numbers: Numbers,
    ) -> tuple[Int[Tensor, "batch kv_heads kept"], Float[Tensor, "batch kv_heads kept"]]:
        """(tokens that stay, their weights in the walk), heaviest first; 0 behind a shorter row's.

        Args:
            k: keys, each row's first token first.
            v: values.
            count: tokens of each row.
            numbers: uniform random numbers.
        """
        k, v = k.float(), v.float()
        kept = torch.arange(k.shape[2], device=k.device).expand(k.shape[:3])
        weights = (kept < count[:, None, None]).float()
        for iteration in range(self.halvings):
            blocks = -(-kept.shape[-1] // self.block)
            signs = self._signs(
                _at(k, kept) * (weights > 0)[..., None], _at(v, kept) * weights[..., None],
                numbers(iteration, blocks),
            )  # fmt: skip
            fresh = _halved(signs, count)
            count = count // 2
            order = (-fresh).sort(dim=-1, stable=True).indices[..., : int(count.max())]
            kept, weights = kept.gather(-1, order), (weights * fresh).gather(-1, order)
            there = torch.arange(order.shape[-1], device=k.device) < count[:, None, None]
            weights = torch.where(there, weights, 0.0)
        return kept, weights

    def _signs(
        self, k: Tensor, v: Tensor, numbers: Float[Tensor, "#batch kv_heads blocks block"]
    ) -> Float[Tensor, "batch kv_heads tokens"]:
        """The walk of every block, in step."""
        tokens, pad = k.shape[2], numbers.shape[2] * self.block - k.shape[2]
        k, v = (F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, self.block)) for x in (k, v))
        centred = k - k.mean(dim=-2, keepdim=True)
        power = centred @ centred.transpose(-1, -2) * (self.temperature / math.sqrt(k.shape[-1]))
        kernel = power.sub_(self.beta).clamp_(max=MOST).exp_()
        if self.use_values:
            kernel *= v @ v.transpose(-1, -2) + FLOOR
        signs = torch.zeros(kernel.shape[:-1], device=k.device)
        signs[..., 0] = 1.0
        for i in range(1, self.block):
            pull = (kernel[..., i, :i] * signs[..., :i]).sum(dim=-1)
            up = numbers[..., i] < 0.5 - self.gamma * pull
            signs[..., i] = torch.where(up, 1.0, -1.0)
        return signs.flatten(2)[..., :tokens]

    def _numbers(self, layer: int, times: Sequence[int], like: Tensor) -> Numbers:
        """Random numbers of a layer whose rows were reduced so many times before."""
        heads = like.shape[1]

        def drawn(iteration: int, blocks: int) -> Tensor:
            made = {
                time: torch.rand(
                    blocks, heads, self.block,  # more blocks draw more, and change none before them
                    generator=_generator(self.seed, layer, time, iteration),
                )
                for time in set(times)
            }  # fmt: skip
            rows = list(made.values()) if len(made) == 1 else [made[time] for time in times]
            return torch.stack(rows).transpose(1, 2).to(like.device)

        return drawn


def _halved(
    signs: Float[Tensor, "batch kv_heads tokens"], count: Int[Tensor, " batch"]
) -> Float[Tensor, "batch kv_heads tokens"]:
    """Weights of which the `count // 2` highest stay: 2, 1, or less for what goes."""
    place = torch.arange(signs.shape[-1], device=signs.device)
    there = place < count[:, None, None]
    half = (count // 2)[:, None, None]
    reached = [
        (((signs == sign) & there).cumsum(dim=-1) == half).long().argmax(dim=-1, keepdim=True)
        for sign in (-1, 1)
    ]
    last = torch.maximum(*reached)
    goes = signs.gather(-1, last)  # the sign of which there are too many
    weights = torch.where(place > last, 1.0, -2.0 * goes * signs)
    return weights.masked_fill(~there, -torch.inf)


def _halvings(keep: float) -> int:
    halvings = -round(math.log2(keep)) if 0 < keep <= 1 else -1
    if halvings < 0 or keep != 0.5**halvings:
        raise UserError(f"keep must be 1, 1/2, 1/4 or another power of a half, got {keep}")
    return halvings


def _generator(*numbers: int) -> torch.Generator:
    # Tuples of whole numbers hash alike in every process.
    return torch.Generator().manual_seed(hash(numbers) & (2**62 - 1))


def _at(x: Tensor, slots: Tensor) -> Tensor:
    return x.gather(2, slots[..., None].expand(-1, -1, -1, x.shape[-1]))
