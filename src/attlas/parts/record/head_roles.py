"""Head roles: what each head does with a text, in numbers that one pass gives.

Of the weights A_ij of query i, means over the queries that are no padding:

    entropy      − Σ_j A_ij ln A_ij, in nats                     how widely it spreads
    sink         Σ A over the first `sinks` tokens               how much rests on them
    self         A_ii                                             on the token itself
    previous     A_i,i−1                                          on the token before it
    distance     Σ_j A_ij · abs(i − j), in tokens                 how far from itself it looks
    peak         max_j A_ij                                       how surely
    duplicate    Σ A over j < i with id_j = id_i                  on the same token, earlier
    induction    Σ A over j ≤ i with id_{j−1} = id_i              on what came after it, earlier
    copying      Σ A over j ≤ i with id_j = id_{i+1}              on what in fact comes next

The last three are 0 for a query without ids, and are left out where no call had any. `copying` is a mean
over the queries whose next token came: that of a call's last query comes with the next call, for which
its weights are held, and those of some before it, which may be last when tokens are taken back. Where
more are taken back than are held, the query that is then the last stays without. In beam search earlier
tokens are those that a row held when they came.

Cost: `ops.row_statistics` where no part changes weights and the cache dropped no token, so that nothing
is held of all pairs; else one pass over the weights, a block at a time. Nine numbers a query are kept.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas import masks, ops
from attlas.attach.blocks import weight_blocks
from attlas.attach.call import Call, ForwardPass
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.kinds.analysis import Scores
from attlas.ops.row_features import of_weights, pair_features, products
from attlas.options import option
from attlas.parts.record.rows import RowRecorder, repeated
from attlas.positions import ScoreMod

#: What is recorded, and the name of each among the op's statistics.
NAMES = {
    "entropy": "entropy", "sink": "first", "self": "itself", "previous": "previous",
    "distance": "distance", "peak": "peak", "duplicate": "duplicate", "induction": "induction",
    "copying": "copying",
}  # fmt: skip
#: What a large one says.
MEANINGS = {
    "entropy": "spreads widely, in nats", "sink": "rests on the first tokens",
    "self": "looks at the token itself", "previous": "looks at the token before",
    "distance": "looks far back, in tokens", "peak": "is sure of one token",
    "duplicate": "finds the same token earlier",
    "induction": "finds what came after the same token earlier",
    "copying": "looks at what in fact comes next",
}  # fmt: skip
#: Those that hang on token ids, and the column of one of them.
BY_ID = ("duplicate", "induction", "copying")
COPYING = list(NAMES).index("copying")
#: Weights of a call's last queries that are held of a layer, at least of one: 1 MiB in float32.
HELD = 2**18


@mechanism("head-roles", paper="")
class HeadRoles(RowRecorder):
    """Records what each head does, {name: [layers, batch, heads]}; with rows [..., tokens]."""

    inspects = "roles"

    sinks: int = option("how many first tokens count as sinks", default=1, at_least=1)
    rows: bool = option("give every query's numbers instead of their means", default=False)

    def setup(self) -> None:
        """Nothing is recorded yet."""
        super().setup()
        self._forget()

    def _forget(self) -> None:
        self._ids: Tensor | None = None
        self._valid: Tensor | None = None
        #: Which tokens' next one was there when their weights were looked at.
        self._followed = torch.zeros(0, dtype=torch.bool)
        #: By layer, blocks of the weights of the last tokens, whose next one is to come, and their keys.
        self._waiting: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def begin(self, forward_pass: ForwardPass) -> None:
        """Take in the ids; the last token of the call before learns which token follows it."""
        super().begin(forward_pass)
        offset, length = forward_pass.offset, forward_pass.length
        if offset == 0 or offset != len(self._followed):
            self._forget()
            self._followed = torch.zeros(offset, dtype=torch.bool)
        self._valid = forward_pass.valid
        self._ids = self._with(forward_pass)
        self._resolve(offset)
        self._followed = torch.cat([self._followed, torch.ones(length, dtype=torch.bool)])
        if length:
            self._followed[-1] = False

    def _with(self, forward_pass: ForwardPass) -> Int[Tensor, "batch seen"] | None:
        """The ids of all tokens, −1 where there is none; None where no call had any."""
        own, before, offset = forward_pass.ids, self._ids, forward_pass.offset
        if own is None and before is None:
            return None
        if own is None:
            assert before is not None
            own = before.new_full((len(before), forward_pass.length), -1)
        elif forward_pass.valid is not None:
            here = forward_pass.valid[:, offset : offset + own.shape[1]].to(own.device)
            own = own.masked_fill(~here, -1)
        if before is None:
            before = own.new_full((len(own), offset), -1)
        return torch.cat([repeated(before, len(own), self), own], dim=1)

    def _resolve(self, offset: int) -> None:
        """What the last token of the call before copies, now that the next one is there."""
        waiting, self._waiting = self._waiting, {}
        if self._ids is None or not waiting:
            return
        for layer, blocks in waiting.items():
            weights, keys = blocks[-1]
            weights, known = weights[:, :, -1:], self._rows[layer]
            if len(weights) != len(self._ids):
                weights = repeated(weights, len(self._ids), self)
                keys = keys if keys.ndim == 1 else repeated(keys, len(self._ids), self)
                known[:] = [repeated(block, len(self._ids), self) for block in known]
            at = torch.tensor([offset - 1], device=weights.device)
            until = at.new_zeros(len(weights))
            features = pair_features(at, keys, until, self._ids.to(at.device), weights.dtype)
            known[-1][:, :, -1, COPYING] = products(weights, features[..., -1:, :])[:, :, 0, 0]
            self._waiting[layer] = [(weights, keys)]  # the next token may be taken back
        self._followed[offset - 1] = True

    def whole(self, call: Call) -> bool:
        """Without weights, where queries are many and all tokens are there."""
        few = call.q.shape[2] == 1 or call.forward_pass.drafted
        if few or call.original_positions is not None or call.changers:
            return False
        heads = self.where.heads_of(call.layer)
        count = call.q.shape[1]
        at = torch.arange(count) if heads is None else torch.tensor(heads)
        at = at.to(call.q.device)
        q, k, mask, sinks = call.q, call.k, call.mask, call.sinks
        if heads is not None:
            q, k = q[:, at], k[:, at // call.groups]
            mask = mask[:, at] if mask is not None and mask.shape[1] > 1 else mask
            sinks = None if sinks is None else sinks[at]
        found = ops.row_statistics(
            q, k, ids=self._ids_on(call), first=self._until(call),
            mask=masks.causal if mask is None and call.is_causal else mask,
            score_mod=_of_heads(call.score_mod, at), sinks=sinks, valid=call.valid,
            scale=call.scaling, q_offset=call.forward_pass.offset,
        )  # fmt: skip
        each = [getattr(found, name) for name in NAMES.values()]
        each = [torch.zeros_like(found.entropy) if x is None else x for x in each]
        self._append(call, torch.stack(each, dim=-1))
        if call.is_causal:  # another call may follow
            self._hold(call, *_last(call, at.tolist(), self._held(call)))
        return True

    def update(self, call: Call, weights: Tensor, queries: Tensor, keys: Tensor) -> None:
        """Measure a block of weights, and hold those of the last queries."""
        super().update(call, weights, queries, keys)
        if call.is_causal:
            self._hold(call, weights[:, :, -self._held(call) :].detach().clone(), keys)

    def _hold(self, call: Call, weights: Tensor, keys: Tensor) -> None:
        """Hold weights behind those held: of all queries of a call and the one before, or of fewer."""
        count, held = self._held(call), self._waiting.setdefault(call.layer, [])
        held.append((weights, keys))
        wanted = count + (count == call.q.shape[2])
        while sum(later.shape[2] for later, _ in held[1:]) >= wanted:
            del held[0]

    def _held(self, call: Call) -> int:
        """Of how many of a call's last queries weights are held."""
        batch, heads, count, _ = call.q.shape
        if call.forward_pass.drafted:
            return count
        return min(count, max(1, HELD // (batch * heads * call.k.shape[2])))

    def measure(
        self, call: Call, weights: Tensor, queries: Tensor, keys: Tensor
    ) -> Float[Tensor, "batch heads query statistics"]:
        """The statistics of a block."""
        features = pair_features(queries, keys, self._until(call), self._ids_on(call), weights.dtype)
        found = of_weights(weights, features)
        none = torch.zeros_like(found["entropy"])
        return torch.stack([found.get(name, none) for name in NAMES.values()], dim=-1)

    def _ids_on(self, call: Call) -> Tensor | None:
        return None if self._ids is None else self._ids.to(call.q.device)

    def _until(self, call: Call) -> Int[Tensor, " batch"]:
        """The column before which the valid tokens of each row are its first ones."""
        shared, key = call.forward_pass.shared, ("first tokens", self.sinks)
        if key not in shared:
            columns = torch.arange(call.rows.seen, device=call.q.device)
            there, rank = call.rows.at(columns.expand(call.q.shape[0], -1))
            shared[key] = ((there & (rank < self.sinks)) * (columns + 1)).amax(-1)
        found: Tensor = shared[key]
        return found.to(call.q.device)

    def take_back(self, seen: int) -> None:
        """Forget the tokens behind the first `seen`; the last that stays has no next one yet."""
        super().take_back(seen)
        gone = len(self._followed) - seen
        if gone <= 0:
            return
        self._followed = self._followed[:seen].clone()
        self._followed[-1:] = False
        self._ids = None if self._ids is None else self._ids[:, :seen]
        for layer, known in self._rows.items():
            if known:
                known[-1] = known[-1].clone()
                known[-1][:, :, -1, COPYING] = 0.0
            left, kept = gone, []
            for weights, keys in reversed(self._waiting.pop(layer, [])):
                stays = max(0, weights.shape[2] - left)
                left -= weights.shape[2] - stays
                kept += [(weights[:, :, :stays], keys)] if stays else []
            if kept:
                self._waiting[layer] = kept[::-1]

    def result(self) -> dict[str, Float[Tensor, "layers batch heads *tokens"]]:
        """By name, means over the valid queries, or with `rows` every query's own; layers first."""
        if self.rows:
            whole: Tensor = super().result()
            return {n: whole[..., i] for i, n in enumerate(NAMES) if self._told(n)}
        sums, counts = self._sums()
        return self._named(sums / counts.clamp(min=1)[:, None])

    def head_scores(self) -> dict[str, Scores]:
        """By name, means over the valid queries of all rows."""
        sums, counts = self._sums()
        found = self._named(sums.sum(1) / counts.sum(0).clamp(min=1))
        return {name: Scores(values, MEANINGS[name]) for name, values in found.items()}

    def _sums(self) -> tuple[Tensor, Tensor]:
        """([layers, batch, heads, statistics] summed over queries, [batch, statistics] how many)."""
        if not self._rows:
            raise UserError("HeadRoles has recorded nothing yet; run the model inside `with attach(...)`")
        layers = [torch.cat(self._rows[layer], dim=2) for layer in sorted(self._rows)]
        sums = torch.stack([rows.sum(dim=2) for rows in layers])
        batch, tokens, device = sums.shape[1], layers[0].shape[2], sums.device
        here = slice(self._first, self._first + tokens)
        asked = torch.ones(batch, tokens, dtype=torch.bool, device=device)
        if self._valid is not None:
            asked = self._valid[:, here].to(device)
        counts = asked.sum(1)[:, None].repeat(1, len(NAMES))
        if self._ids is not None:
            there = torch.nn.functional.pad(self._ids >= 0, (0, 1))[:, 1:][:, here].to(device)
            counts[:, COPYING] = (asked & there & self._followed[here].to(device)).sum(1)
        return sums, counts

    def _told(self, name: str) -> bool:
        return name not in BY_ID or self._ids is not None

    def _named(self, found: Tensor) -> dict[str, Tensor]:
        return {n: found[..., i] for i, n in enumerate(NAMES) if self._told(n)}


def _last(
    call: Call, heads: list[int], count: int
) -> tuple[Float[Tensor, "batch heads count keys"], Int[Tensor, " keys"]]:
    """Weights of the call's last queries, and the keys, which are widened for a few heads at a time."""
    last = replace(
        call, q=call.q[:, :, -count:], forward_pass=call.forward_pass.last(count),
        mask=None if call.mask is None else call.mask[:, :, -count:],
    )  # fmt: skip
    some = [heads[n : n + call.groups] for n in range(0, len(heads), call.groups)]
    whole = call.q.shape[0] * call.groups * count * call.k.shape[2]
    found = [block for each in some for block in weight_blocks(last, whole, each)]
    return torch.cat([weights for weights, _, _ in found], dim=1), found[0][2]


def _of_heads(mod: ScoreMod | None, heads: Tensor) -> ScoreMod | None:
    """A change of scores in terms of some of the heads."""
    if mod is None:
        return None

    def change(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mod(s, b, heads[h], q, k)

    return change
