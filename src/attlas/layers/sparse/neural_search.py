"""Neural attention search (NAtS): every token learns how long later tokens see it, and then is dropped.

    type_j    argmax of W_s x_j, a choice for each key head; while training a Gumbel-softmax sample of it,
              straight through. The first token of a row is global.
    query t sees j ≤ t     always,                                          if j is global
                           until and including the next global token,       if j is local
                           while t ≤ j + W,                                 if j is a sliding-window token
    weights = softmax over what is seen of q kᵀ / √d

As a function of the samples G, L, S ∈ {0, 1} of a token (one of them is 1) the mask is

    M_tj = G_j + L_j · Π_{j<g<t} (1 − G_g) + S_j · [t ≤ j + W]

and the gradient of the loss by M_tj is p_tj (v_j − y_t) · ∂loss/∂y_t, where p is the softmax over all
earlier tokens, hidden ones included, and y what the layer gives. x gets no gradient through the types.
Added to the loss: λ · Σ life_j / n over all rows, query heads and tokens, life_j being n − j for a global
token and the steps to the next global one for a local one.

A `DynamicCache` holds the tokens that a later one will see and no others, each key head its own; with a
position encoding that changes scores by place it holds all.

Cost: that of softmax attention, and as much again while training; decoding reads the tokens held.
Reduces to causal softmax attention where all tokens are global.
Source: "Neural Attention Search", and its authors' program for what the text leaves open: that a local
token is still seen by the next global one, that S lives W steps beside its own, the first token, the
form of p, the detached x, λ and W. The gradient is that of the formula above; the program credits a
token's pairs before the next global token to L alone, and lets a token that is not global know of the
pairs that it would hide for 16 tokens around it only.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Integer
from torch import Tensor, nn
from torch.nn.functional import gumbel_softmax

from attlas import masks, ops, queries
from attlas.attention import Attention
from attlas.catalog.registry import Reduction, mechanism
from attlas.hf.caches import DynamicCache
from attlas.inputs import Inputs
from attlas.kinds.claim import Claim
from attlas.masks import Mask
from attlas.masks.algebra import Reach
from attlas.masks.patterns import ByTensor
from attlas.options import option
from attlas.remembering import layer_of, with_states
from attlas.storage.layer import StoredLayer
from attlas.storage.slots import first_ones
from attlas.supports import Supports
from attlas.tracing import stretches, traced


def _all_global(layer: NeuralAttentionSearch, plain: Attention) -> None:
    """Where no type is likelier, a token is global."""
    layer.scorer.weight.zero_()
    plain.load_state_dict(layer.state_dict(), strict=False)


@mechanism(
    "neural-attention-search", aliases=("nats",), example={"window": 2},
    reduces_to=Reduction("softmax", {}, _all_global),
)  # fmt: skip
class NeuralAttentionSearch(Attention):
    """Causal attention whose tokens have lifetimes, which each learns."""

    claims = (
        Claim(
            "tokens that learn when to go leave the loss as it is",
            ours="neural-attention-search(sparsity=0.0005)", task="shakespeare-bytes",
            better="lower", margin=0.03, steps=500, batch=16,
        ),
    )  # fmt: skip
    supports: ClassVar[Supports] = Supports(
        bidirectional=False, cross=False, masks="padding", counts=True, remembers=True
    )
    expected_failures: ClassVar[dict[str, str]] = {
        "gradients-reach": "outside training a token's type is a choice, which has no gradient"
    }
    #: What is held would be dropped by a number of tokens that are there.
    roomy: ClassVar[bool] = False

    window: int = option("W, steps that a sliding-window token outlives", default=16, at_least=0)
    sparsity: float = option("λ, weight of the lifetimes among the added losses", default=5e-7)

    def make_projections(self) -> None:
        """And what scores the three types of every key head's tokens."""
        super().make_projections()
        self.scorer = nn.Linear(self.dim, self.kv_heads * 3, bias=False)

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; each key has its type beside it."""
        types = self.types(inputs)
        self.auxiliary_loss = self.lifetimes(types, inputs) if self.training else None
        inputs.carry("types", types)
        return super().project(inputs)

    def types(self, inputs: Inputs) -> Float[Tensor, "batch kv_heads tokens 2"]:
        """(is it global, is it local) of every token; a sliding-window token, as padding, is neither."""
        logits = rearrange(self.scorer(inputs.x.detach()), "b t (h o) -> b h t o", o=3)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.training:
            drawn = gumbel_softmax(logits, hard=True)[..., :2]
        else:
            first, second, third = logits.unbind(-1)
            whole = first >= second.maximum(third)
            drawn = torch.stack((whole, ~whole & (second >= third)), dim=-1).to(logits.dtype)
        at, tokens = _ranks(inputs), inputs.x.shape[1]
        start = (at[:, -tokens:] == 0)[:, None, :, None]
        drawn = torch.where(start, torch.tensor((1.0, 0.0), device=drawn.device).to(drawn), drawn)
        valid = inputs.valid_now
        return drawn if valid is None else drawn * valid[:, None, :, None]

    def lifetimes(
        self, types: Float[Tensor, "batch kv_heads tokens 2"], inputs: Inputs
    ) -> Float[Tensor, ""]:
        """λ times the shares of a row that tokens live, of this pass's tokens alone."""
        at = _ranks(inputs)[:, None, -types.shape[2] :]
        count = at[..., -1:] + 1
        after = torch.where(types[..., 0] > 0, at, count - 1).flip(-1).cummin(-1).values.flip(-1)
        after = torch.cat((after[..., 1:], (count - 1).expand_as(after[..., :1])), dim=-1)
        steps = torch.stack((count - at + torch.zeros_like(after), after - at), dim=-1)
        lived = types * types.detach() * steps / count[..., None]
        loss: Tensor = self.sparsity * lived.sum() * (self.heads // self.kv_heads)
        return loss

    def restore(self, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """All that is held; the cache then lets go of what no later token sees."""
        held = layer_of(inputs.cache, self.layer_idx)
        if isinstance(held, StoredLayer) and "held" in held.states and held.index is not None:
            inputs.notes["columns"] = held.dense_positions().long()
        else:
            inputs.check_places(k.shape[2])
        if self._drops(inputs, held):
            assert inputs.cache is not None
            stored = with_states(inputs.cache, self.layer_idx)
            stays = self.until(k.shape[2], inputs) >= inputs.key_positions.shape[-1]
            stays = stays.expand(len(k), -1, -1)
            if not stays.all():
                stored.keep(*first_ones(stays))
            inputs.remember("held", stays.sum(-1))
        return k, v

    def _drops(self, inputs: Inputs, held: object) -> bool:
        """Whether the cache is one of which tokens can be dropped, and nobody else looks after it."""
        own = not isinstance(held, StoredLayer) or not (held.learned or held.bodies)
        plain = type(inputs.cache) is DynamicCache and not getattr(inputs.cache, "recorded", False)
        return own and plain and self.door is None and self.score_mod is None and not traced()

    def until(self, slots: int, inputs: Inputs) -> Integer[Tensor, "#batch kv_heads slots"]:
        """The last column whose query sees the key of each slot, the number of columns if later ones
        may; −1 where there is no token."""
        types, total = inputs.carried["types"][:, :, -slots:], inputs.key_positions.shape[-1]
        columns = inputs.notes.get("columns")
        if columns is None:
            columns = torch.arange(total - slots, total, device=types.device)
        columns = columns.expand(types.shape[:3])
        there, at, ranks = columns >= 0, columns, _ranks(inputs)
        if inputs.valid is not None:
            where = columns.clamp(min=0).flatten(1)
            there = there & inputs.valid.gather(1, where).view_as(columns)
            at = ranks.gather(1, where).view_as(columns)
        whole, local = ((types > 0.5) & there[..., None]).unbind(-1)
        ends = torch.where(whole, columns, total).flip(-1).cummin(-1).values.flip(-1)
        following = torch.cat((ends[..., 1:], torch.full_like(ends[..., :1], total)), dim=-1)
        short = at + self.window
        if inputs.valid is not None:
            last = torch.searchsorted(ranks, short.flatten(1), right=True).view_as(short) - 1
            short = torch.where(short > ranks[:, -1, None, None], total, last)
        found = torch.where(whole, total, torch.where(local, following, short))
        return found.masked_fill(~there, -1)

    def mask(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> Mask | Bool[Tensor, "b h queries keys"] | None:
        """Earlier tokens that still live."""
        slots, total = k.shape[2], inputs.key_positions.shape[-1]
        alive = self.until(slots, inputs) - (total - slots)
        lives: Mask = masks.by_groups(Lives(alive), self.heads // self.kv_heads)
        # Slots of padding and empty ones are hidden by their lives.
        return masks.causal & lives

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs) -> Tensor:
        """In one call; while training with gradients for the types."""
        y = super().attend(q, k, v, inputs)
        types = inputs.carried["types"]
        if not (self.training and types.requires_grad and torch.is_grad_enabled()):
            return y
        fixed = [x.detach() for x in (q, k, v, y)]
        most = queries.CPU_BLOCK if q.device.type == "cpu" else queries.BLOCK
        rows = max(1, most // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
        return y + torch.cat([
            ops.recomputed(self._credited, some, *fixed, types, inputs)
            for some in stretches(q.shape[2], rows)
        ], dim=2)  # fmt: skip

    def _credited(
        self, rows: slice, q: Tensor, k: Tensor, v: Tensor, y: Tensor,
        types: Float[Tensor, "batch kv_heads keys 2"], inputs: Inputs,
    ) -> Float[Tensor, "batch heads queries width"]:  # fmt: skip
        """Zeros, through which the mask of some queries gets its gradient."""
        keys, offset = k.shape[2], k.shape[2] - q.shape[2]
        at = torch.arange(offset, keys, device=q.device)[rows]
        with torch.no_grad():
            scores = ops.grouped_product(q[:, :, rows] * self.scale, k.mT)
            if (change := inputs.by_positions(self.score_mod, keys)) is not None:
                scores = change(scores, *ops.indices(scores, int(at[0])))
            hidden = torch.arange(keys, device=q.device) > at[:, None]
            if inputs.valid is not None:
                hidden = hidden | ~inputs.valid[:, None, None, -keys:]
            shares = ops.softmax(scores.masked_fill(hidden, -torch.inf))
        mask = soft_mask(types, at, _ranks(inputs)[:, -keys:], self.window)
        moved = shares * ops.repeated(mask - mask.detach(), self.heads).to(shares.dtype)
        return ops.grouped_product(moved, v) - moved.sum(-1, keepdim=True) * y[:, :, rows]


def soft_mask(
    types: Float[Tensor, "batch kv_heads keys 2"], at: Integer[Tensor, " queries"],
    ranks: Integer[Tensor, "#batch keys"], window: int,
) -> Float[Tensor, "batch kv_heads queries keys"]:  # fmt: skip
    """M of some queries and the keys up to them, 0 or 1, with its gradients by the types.

    Args:
        types: (G, L) of the keys.
        at: slots of the queries.
        ranks: which token of its row stands in each slot.
        window: W.
    """
    whole, local = types.unbind(-1)
    slots = torch.arange(types.shape[2], device=types.device)

    def between(x: Tensor) -> Tensor:
        """Sum of x over j < g < t; 0 where t is j."""
        sums = x.cumsum(-1)
        found = (sums - x)[..., at, None] - sums[..., None, :]
        return found.masked_fill(slots >= at[:, None], 0.0)

    # A product of (1 − G): with no factor 0 every factor counts, with one that one, with more none.
    every, zeros = between(whole), between(whole * whole.detach())
    number = every.detach().round()
    none, one = 1 - (every - every.detach()), zeros.detach() - zeros
    lives = torch.where(number <= 0, none, torch.where(number == 1, one, torch.zeros_like(one)))
    near = (ranks[:, None, at, None] - ranks[:, None, None] <= window).to(types.dtype)
    whole, local = whole[..., None, :], local[..., None, :]
    return whole + local * lives + (1 - whole - local) * near


class Lives(ByTensor):
    """A key is seen up to a query of its own.

    Args:
        until: the last query of each key.
    """

    def __init__(self, until: Integer[Tensor, "batch heads keys"]) -> None:
        super().__init__(until, fixed=True)
        self.batch, self.heads = until.shape[:2]

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """q ≤ until(k)."""
        until = self.tensor(k)
        return q <= until[b, h, k.clamp(max=until.shape[2] - 1)]

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        """By the longest and the shortest life of a block."""
        until = self.tensor(k_lo)
        steps = torch.arange(int((k_hi - k_lo).max()) + 1, device=k_lo.device)
        inside = torch.minimum(k_lo[:, None] + steps, k_hi[:, None])
        own = until[:, :, inside.clamp(max=until.shape[2] - 1)]
        return q_lo <= own.amax(-1)[:, :, None], q_hi <= own.amin(-1)[:, :, None]

    def __repr__(self) -> str:
        return f"lives({tuple(self.held.shape)})"


def _ranks(inputs: Inputs) -> Integer[Tensor, "#batch all_keys"]:
    """Which token of its row every column holds, padding left out."""
    if inputs.valid is None:
        return torch.arange(inputs.key_positions.shape[-1], device=inputs.x.device)[None]
    return (inputs.valid.long().cumsum(-1) - 1).clamp(min=0)
