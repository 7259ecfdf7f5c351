"""Key-driven grouped attention: keys decide how many query heads each of them serves.

    n_g = ‖K_g‖_F over the tokens,   a_g = round(H s_g / Σ s), half to even;   too many: one off the
    first largest, too few: one on the first smallest, until Σ a = H;   group g serves the next a_g heads

    key-distributed (KDGQA)   s = (n − min n) / (max n − min n)
    dynamic (DGQA)            s = |n − m| or 0.9 n + 0.1 m;   m ← (m + n) / w each w training passes
    perturbed (PGQA)          equal groups;   o_h ← o_h − (z_h std o_h + mean o_h)

z is uniform noise, 0 where a group's i-th head has its i-th number, then standardised; one draw for a
batch. No gradient flows through the allocation. Norms, means and deviations are those of whole sequences,
so there is no causal form.

Cost: grouped attention whose keys and values are repeated for the query heads.
Reduces to multi-query attention with one key head, to grouped-query attention with equal norms; the
perturbed one does in evaluation, where the numbers of each head's values sum to 0.
Source: "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention" and the authors' code. The
code sums n over the batch (`over="batch"`); here each sequence has its own, so that its neighbours change
nothing. Nor does evaluation draw or store here: the code makes each batch's n the next one's m and
perturbs as in training; here m stays as trained, and of the noise only its mean is left. DGQA's Σ a is
repaired as KDGQA's, at random in the code. The paper's abstract has the noise on the attention maps, the
code on what they give, as here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from attlas import ops
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.inputs import Inputs
from attlas.layers.heads.multi_query import GroupedQuery
from attlas.network import moving
from attlas.options import option
from attlas.supports import Supports


def allocation(shares: Tensor, heads: int) -> Tensor:
    """Query heads of each group [..., groups], `heads` in all, from its share in any unit."""
    groups, total = shares.shape[-1], shares.sum(-1, keepdim=True)
    shares = torch.where(total > 0, ops.divided(shares, total), 1 / groups)
    counts = (shares * heads).round().long()
    first = torch.arange(groups, device=shares.device)
    for _ in range(groups):  # rounding is off by half a head a group at most
        over = counts.sum(-1, keepdim=True) - heads
        largest = first == (counts * groups - first).argmax(-1, keepdim=True)
        smallest = first == (counts * groups + first).argmin(-1, keepdim=True)
        counts = counts - (largest & (over > 0)).long() + (smallest & (over < 0)).long()
    return counts


def _copy(layer: Any, plain: Any) -> None:
    plain.load_state_dict(layer.state_dict(), strict=False)


class _Grouped(Attention):
    """Half as many groups as heads unless told, and the way to them from multi-head attention."""

    supports = Supports(causal=False)
    changes = ("project",)

    kv_heads: int = option(
        "groups, a divisor of heads; half as many as heads unless given", at_least=1,
        kw_only=False, factory=lambda layer: max(1, layer.heads // 2),
    )  # fmt: skip

    def load_from(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Take over a plain layer's weights, key and value heads averaged where it has one a head."""
        with torch.device("meta"):
            plain = GroupedQuery(self.dim, self.heads, self.kv_heads, head_dim=self.head_dim)
        return super().load_from(plain.pooled(weights))


@mechanism(
    "key-driven-gqa", aliases=("kdgqa",), example={"heads": 4, "kv_heads": 2},
    reduces_to=Reduction("multi-query-attention", {"kv_heads": 1}, _copy),
)  # fmt: skip
class KeyDriven(_Grouped):
    """Grouped attention with groups sized by the norms of their keys."""

    over: Literal["sequence", "batch"] = option(
        "what an allocation is made for: each sequence, or the whole batch", default="sequence"
    )

    def restore(self, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Each query head's keys and values: those of the group that serves it."""
        counts = self.counts(self.norms(k, inputs))
        return self.served(k, counts), self.served(v, counts)

    def norms(self, k: Tensor, inputs: Inputs) -> Tensor:
        """n, [batch, groups]; of the whole batch it is the mean."""
        valid = inputs.valid
        k = k.detach() if valid is None else k.detach() * valid[:, None, :, None]
        k = k.to(torch.promote_types(k.dtype, torch.float32)).flatten(2)
        norms: Tensor = torch.linalg.vector_norm(k, dim=-1)
        return norms.mean(0).expand_as(norms) if self.over == "batch" else norms

    def counts(self, norms: Tensor) -> Tensor:
        """Query heads of each group, [batch, groups]."""
        return allocation(self.shares(norms), self.heads)

    def shares(self, norms: Tensor) -> Tensor:
        """s but for its unit; none where norms differ by their rounding alone."""
        above, high = norms - norms.amin(-1, keepdim=True), norms.amax(-1, keepdim=True)
        alike = above.amax(-1, keepdim=True) <= 64 * torch.finfo(norms.dtype).eps * high
        return above.masked_fill(alike, 0.0)

    def served(self, x: Tensor, counts: Tensor) -> Tensor:
        """Each query head's keys or values, where groups serve so many heads one after the other."""
        heads = torch.arange(self.heads, device=x.device)
        group = (counts.cumsum(-1)[:, None] <= heads[:, None]).sum(-1)
        return x.gather(1, group[..., None, None].expand(len(x), -1, *x.shape[2:]))


@mechanism(
    "dynamic-gqa", paper="key-driven-gqa", aliases=("dgqa",), example={"heads": 4, "kv_heads": 2},
    reduces_to=Reduction("multi-query-attention", {"kv_heads": 1}, _copy),
)  # fmt: skip
class Dynamic(KeyDriven):
    """Groups sized by how norms change; training batches share theirs, from the mean n."""

    window: int = option("w, how many training passes an allocation lasts", default=300, at_least=1)
    by: Literal["change", "average"] = option(
        "s: the change |n − m|, or the average 0.9 n + 0.1 m; m begins at 0", default="change"
    )

    def setup(self) -> None:
        """m, the sizes of the latest allocation, and how many passes there were."""
        super().setup()
        self.stored: Tensor
        self.sizes: Tensor
        self.passes: Tensor
        self.register_buffer("stored", torch.zeros(self.kv_heads))
        self.register_buffer("sizes", torch.full((self.kv_heads,), self.heads // self.kv_heads))
        self.register_buffer("passes", torch.tensor(0))

    @moving
    def restore(self, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Each query head's keys and values, by an allocation that moves in training."""
        return super().restore(k, v, inputs)

    def counts(self, norms: Tensor) -> Tensor:
        """Query heads of each group, [batch, groups]; in training those that the window began with."""
        if not self.training:
            return super().counts(norms)
        mean = norms.mean(0)
        due = self.passes % self.window == 0
        self.sizes.copy_(torch.where(due, super().counts(mean), self.sizes))
        self.stored.copy_(torch.where(due, (self.stored + mean) / self.window, self.stored))
        self.passes.add_(1)
        return self.sizes.expand(len(norms), -1)

    def shares(self, norms: Tensor) -> Tensor:
        """s from n and m."""
        stored = self.stored.to(norms.dtype)
        return (norms - stored).abs() if self.by == "change" else 0.9 * norms + 0.1 * stored


def _centre_values(layer: Any, plain: Any) -> None:
    values = layer.v_proj.weight.data.unflatten(0, (-1, layer.head_dim))
    values.sub_(values.mean(1, keepdim=True))
    _copy(layer, plain)


@mechanism(
    "perturbed-gqa", paper="key-driven-gqa", aliases=("pgqa",),
    reduces_to=Reduction("multi-query-attention", {"kv_heads": 1}, _centre_values),
)  # fmt: skip
class Perturbed(_Grouped):
    """Grouped attention with noise on what each head gives, of that head's mean and deviation."""

    supports = replace(_Grouped.supports, queries="all")
    beyond = ("output: the perturbed form's noise falls on what the heads give",)

    def output(self, heads: Tensor, inputs: Inputs) -> Tensor:
        """Heads less the noise, or less its mean in evaluation, projected."""
        valid = inputs.valid_now if inputs.context is None else None
        shown = heads.new_ones(()) if valid is None else valid[:, None, :, None]
        wide = heads.to(torch.promote_types(heads.dtype, torch.float32))
        centred, deviation = _standardised(wide, shown)
        if self.training:
            noise = torch.rand(wide.shape[1:], dtype=wide.dtype, device=wide.device)
            noise.view(self.kv_heads, -1, wide[0, 0].numel()).diagonal(dim1=1, dim2=2).zero_()
            drawn, unit = _standardised(noise.expand_as(wide), shown)
            centred = centred - drawn * (deviation / unit)
        return super().output(centred.to(heads.dtype), inputs)


def _standardised(x: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """x less each head's mean, and its standard deviation, over the tokens shown."""
    shown = shown.expand_as(x)
    count = shown.sum((2, 3), keepdim=True)
    centred = x - (x * shown).sum((2, 3), keepdim=True) / count.clamp(min=1)
    square = (centred * shown).square().sum((2, 3), keepdim=True)
    variance = square / (count - 1).clamp(min=1)
    return centred, variance.clamp(min=torch.finfo(x.dtype).tiny).sqrt()
