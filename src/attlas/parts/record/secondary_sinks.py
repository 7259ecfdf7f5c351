"""Secondary sinks: tokens behind the first that take on the direction of its state, for some layers.

    h_l(j)          state of token j behind block l;   p the primary sink, each row's first valid token
    cos_l(j)        = h_l(j)·h_l(p) / ‖h_l(j)‖‖h_l(p)‖
    life of p       from s = 1 + argmax_l (‖h_{l+1}(p)‖ − ‖h_l(p)‖)
                    up to but without 1 + argmin_{l ≥ s} (‖h_{l+1}(p)‖ − ‖h_l(p)‖)
    j > p is a secondary sink of layer l in the life of p where |cos_l(j)| > 0.9
    birth, lifetime = the first such layer, and how many there are
    write_l(j)      = m_l(j)·h_l(p) / ‖h_l(p)‖,  m_l the MLP's output; writer = argmax_{l ≤ birth} |write|
    received_l(j)   = Σ_i A_ij / (queries that can see j)

Of the last block the state before the final norm is taken. Cost: five numbers a layer and token beside
the sums of columns; of all states only one layer's are held at a time, and the primary sink's.
Reduces to the report of the primary sink where no other token is flagged.

Source: "On the Existence and Behaviour of Secondary Attention Sinks".
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from attlas.attach.call import Call, ForwardPass, Site
from attlas.attach.part import Recorder
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.options import option
from attlas.parts.record.column_sums import ColumnSums
from attlas.parts.record.rows import repeated
from attlas.storage.rows import Rows

#: What is kept of each token behind each block.
VALUES = ("norm", "cosine", "mlp_norm", "write")


class SecondarySink(NamedTuple):
    """A token that became a sink behind the primary one.

    Attributes:
        row: of the batch.
        token: its column.
        birth: first layer behind which it points along the primary sink.
        lifetime: how many layers it does.
        norm: its state's, behind the layer of birth.
        received: attention that it receives in the layers it lives in, mean over them and the heads.
        writer: layer whose MLP wrote most of the direction.
        write_norm: norm of what that MLP wrote.
    """

    row: int
    token: int
    birth: int
    lifetime: int
    norm: float
    received: float
    writer: int
    write_norm: float


def life_of(norms: Float[Tensor, " layers"]) -> tuple[int, int]:
    """The layers (first, behind the last) from a norm's largest rise to its largest fall after."""
    change = norms.diff()
    if not len(change):
        return 0, len(norms)
    start = int(change.argmax()) + 1
    later = change[start:]
    return start, int(later.argmin()) + start + 1 if len(later) else len(norms)


def flagged(
    norms: Float[Tensor, "layers tokens"],
    cosines: Float[Tensor, "layers tokens"],
    primary: int,
    threshold: float,
) -> Bool[Tensor, "layers tokens"]:
    """One row's map of sinks: the primary one while it lives, and later tokens along it meanwhile."""
    start, stop = life_of(norms[:, primary])
    found = torch.zeros_like(cosines, dtype=torch.bool)
    found[start:stop] = cosines[start:stop].abs() > threshold
    found[:, :primary] = False
    found[start:stop, primary] = True
    return found


@mechanism("secondary-sinks")
class SecondarySinks(Recorder):
    """Records states along the primary sink's, what MLPs write of it, and attention received.

    The result is {"norm", "cosine", "mlp_norm", "write": [layers, batch, tokens], "received": [layers,
    batch, heads, tokens]}; `sink_map` and `sinks` read it.
    """

    points = ("residual", "mlp", "final")
    without = ("layers", "heads")  # a sink's life is told over all layers

    primary: int = option("which of a row's valid tokens is the primary sink", default=0, at_least=0)
    threshold: float = option("least |cosine| of a sink", default=0.9, above=0, below=1)

    def setup(self) -> None:
        """Nothing is recorded yet."""
        super().setup()
        self.columns, self._seeing = ColumnSums(), ColumnSums()
        self._clear()

    def _clear(self) -> None:
        self._states: dict[int, Tensor] = {}
        self._rows: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._mlp: Tensor | None = None
        self._known: list[Tensor] = []
        self._first = 0

    def begin(self, forward_pass: ForwardPass) -> None:
        """A call without a past begins a new sequence."""
        self.columns.begin(forward_pass)
        self._seeing.begin(forward_pass)
        self._mlp = None
        if forward_pass.offset == 0:
            self._clear()
        if not self._rows:
            self._first = forward_pass.offset

    def take_back(self, seen: int) -> None:
        """Forget tokens behind the first `seen`."""
        self.columns.take_back(seen)
        self._seeing.take_back(seen)
        for layer, blocks in self._rows.items():
            whole = torch.cat([repeated(b, len(blocks[-1]), self) for b in blocks], dim=1)
            self._rows[layer] = [whole[:, : seen - self._first]]

    # Attention received.

    def update(self, call: Call, weights: Tensor, queries: Tensor, keys: Tensor) -> None:
        """Add a block's columns up, and how many queries could see each."""
        self.columns.update(call, weights, queries, keys)
        there = (keys >= 0).expand(*weights.shape[:2], -1)[:, :, None]
        at = queries - call.forward_pass.offset
        if call.mask is not None:
            there = there & call.mask[:, :, at, : weights.shape[-1]]
        elif call.is_causal:
            there = there & (keys[..., None, :] <= queries[:, None])
        if call.valid is not None:
            there = there & call.valid[:, None, at, None]
        self._seeing.update(call, there.expand_as(weights).to(weights.dtype), queries, keys)

    def received(self) -> Float[Tensor, "layers batch heads tokens"]:
        """Mean attention that each token receives from the queries that can see it."""
        return self.columns.result() / self._seeing.result().clamp(min=1)

    def sink_metric(self, epsilon: float = 0.3) -> Float[Tensor, " tokens"]:
        """Percentage of (layer, row, head) in which each token receives more than `epsilon`.

        Raises:
            ValueError: epsilon outside (0, 1).
        """
        if not 0 < epsilon < 1:
            raise UserError(f"epsilon must lie in (0, 1), got {epsilon}")
        return 100 * (self.received() > epsilon).float().mean(dim=(0, 1, 2))

    # States.

    @torch.no_grad()
    def stream(self, site: Site, x: Float[Tensor, "batch query width"]) -> None:
        """What enters a block is the state behind the one before; an MLP's output waits for it."""
        if site.point == "mlp":
            self._mlp = x
        elif site.point == "final":
            self._behind(site.layer, x, site.forward_pass)
        elif site.layer:
            self._behind(site.layer - 1, x, site.forward_pass)

    def _behind(self, layer: int, x: Tensor, forward_pass: ForwardPass) -> None:
        """Measure the states behind a block."""
        wide = torch.promote_types(x.dtype, torch.float32)
        rank, valid = Rows(forward_pass.valid, forward_pass.offset + x.shape[1]).last(
            x.shape[1], x.shape[0], x.device
        )
        is_primary = valid & (rank == self.primary)
        state, mlp = x.to(wide), torch.zeros_like(x) if self._mlp is None else self._mlp
        own = (state * is_primary[..., None]).sum(dim=1)
        known = self._states.get(layer)
        along = own if known is None else repeated(known, len(own), self)
        along = torch.where(is_primary.any(1)[:, None], own, along)
        self._states[layer] = along
        unit, mlp = F.normalize(along, dim=-1)[:, None], mlp.to(wide)
        measured = torch.stack(
            [state.norm(dim=-1), F.cosine_similarity(state, unit, dim=-1),
             mlp.norm(dim=-1), (mlp * unit).sum(-1), rank == self.primary],
            dim=-1,
        ) * valid[..., None]  # fmt: skip
        self._rows[layer].append(measured)

    def _measured(self) -> Float[Tensor, "layers batch tokens values"]:
        rows = [self._rows[layer] for layer in sorted(self._rows)]
        return torch.stack(
            [torch.cat([repeated(b, len(each[-1]), self) for b in each], dim=1) for each in rows]
        )

    # What is read of them.

    def result(self) -> dict[str, Tensor]:
        """All that was recorded."""
        measured = self._measured()
        named = {name: measured[..., i] for i, name in enumerate(VALUES)}
        return named | {"received": self.received()}

    def sink_map(self) -> Bool[Tensor, "layers batch tokens"]:
        """Which tokens are sinks behind each layer, the primary one included."""
        measured = self._measured()
        found = torch.zeros(measured.shape[:3], dtype=torch.bool, device=measured.device)
        for row in range(measured.shape[1]):
            primary = measured[0, row, :, -1].nonzero()
            if len(primary):
                norms, cosines = measured[:, row, :, 0], measured[:, row, :, 1]
                found[:, row] = flagged(norms, cosines, int(primary[0]), self.threshold)
        return found

    def sinks(self) -> list[SecondarySink]:
        """The secondary sinks, row by row."""
        result, found, measured = self.result(), self.sink_map(), self._measured()
        received, told = result["received"].mean(dim=2), []
        for row, token in found.any(dim=0).nonzero().tolist():
            if measured[0, row, token, -1]:
                continue
            layers = found[:, row, token].nonzero().flatten()
            birth = int(layers[0])
            writer = int(result["write"][: birth + 1, row, token].abs().argmax())
            told.append(
                SecondarySink(
                    row, self._first + token, birth, len(layers),
                    float(result["norm"][birth, row, token]),
                    float(received[layers, row, self._first + token].mean()), writer,
                    float(result["mlp_norm"][writer, row, token]),
                )
            )  # fmt: skip
        return told
