"""Eigen attention: keys and values in the few directions that a layer's keys and values lie along.

Calibration sums Σ x xᵀ; its eigenvectors are the left singular vectors of the matrix with columns x,
its eigenvalues λ the squares of the singular values:

    U   of keys and queries together, un-rotated: q·k ≈ (Uᵀq)·(Uᵀk), whose error over the calibration
        data is at most half of the energy discarded, ‖QKᵀ − QUUᵀKᵀ‖ ≤ ½ Σ_{i>r} λ_i
    W   of values, for each key head

    cached   Uᵀ R(−t) k  and  Wᵀ v      read as   k ≈ R(t) U k_low   and   v ≈ W v_low

In a model with rotary positions all heads of a layer share U, else each key head has its own; of the
queries that share a key head the first takes part, as one. Energy counts λ; the authors' code sums
singular values, √λ, and searches a threshold for each layer by the error of the layer's output. Here
one threshold serves all layers: as given, or the highest at which the cache keeps to its share of bytes.

The current token and the newest, where asked, stay as they came; the model's own projections compute
them. The authors' other form, with the bases folded into the projections, is `attlas.cache.folding`.

Cost: 2·r·dim operations a number of keys and values read; bytes fall to (r_k + r_v)/(2·dim), with a
position of 4 bytes a token beside rotated keys (and for a while one more, with the cache), and the
bases beside the model's weights. Full rank reduces to full attention.

Source: "Eigen Attention: Attention in Low-Rank Space for KV Cache Compression".
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attlas.attach.call import Call
from attlas.cache.part import CachePart
from attlas.cache.quantizer import Quantizer
from attlas.cache.rotations import look, rotation_of
from attlas.calibration import Calibrated, Calibrator
from attlas.catalog.registry import mechanism
from attlas.errors import UserError, exactly_one
from attlas.hf.caches import DynamicLayer
from attlas.options import option
from attlas.storage.body import Body
from attlas.storage.layer import LayerState, Taken
from attlas.storage.low_rank import Bases, LowRankBody, rotated
from attlas.storage.rotary import Rotation


class Subspaces(Calibrator):
    """Σ x xᵀ of keys and queries together and of values, for each full-attention layer.

    Attributes:
        layers: the full-attention layers.
        rotations: how each of them rotates; None when it does not.
    """

    def setup(self) -> None:
        """The model is not known yet."""
        super().setup()
        self.layers: tuple[int, ...] = ()
        self.rotations: dict[int, Rotation | None] = {}

    def check(self, model: nn.Module) -> None:
        """Find the layers and the rotation.

        Raises:
            ValueError: there is no full-attention layer, or its rotation is not known or changes.
        """
        layers = CachePart.fresh_layers(model)
        self.layers = tuple(i for i, layer in enumerate(layers) if type(layer) is DynamicLayer)
        if not self.layers:
            raise UserError(
                f"{type(model).__name__} has no full-attention layer with a growing cache"
            )
        look(model)
        who = type(self).__name__
        self.rotations = {i: rotation_of(model, i, who, one=True) for i in self.layers}

    def observe(self, call: Call) -> None:
        """Add what the tokens of this call have, padding left out."""
        if call.layer not in self.layers:
            return
        tokens = call.q.shape[2]
        k, v = call.k[:, :, -tokens:].double(), call.v[:, :, -tokens:].double()
        q = call.q[:, :: call.groups].double()
        rotation = self.rotations[call.layer]
        if rotation is not None:
            positions = call.positions[:, None]
            k, q = (rotated(x, rotation.now(), positions, back=True) for x in (k, q))
        if (valid := call.valid) is not None:
            valid = valid[:, None, :, None].to(k)
            k, q, v = k * valid, q * valid, v * valid
        both = torch.einsum("bhtd,bhte->hde", k, k) + torch.einsum("bhtd,bhte->hde", q, q)
        if rotation is not None:
            both = both.sum(dim=0, keepdim=True)
        self.add(f"{call.layer}.kq", both)
        self.add(f"{call.layer}.v", torch.einsum("bhtd,bhte->hde", v, v))

    def tensors(self) -> dict[str, Tensor]:
        """Directions by falling energy, and the energies."""
        found = {}
        for name, gram in self.sums.items():
            energy, basis = torch.linalg.eigh(gram.cpu())
            found[f"{name}.basis"] = basis.flip(-1).contiguous()
            found[f"{name}.energy"] = energy.flip(-1).clamp(min=0.0)
        return found


@mechanism("eigen-attention", example={"keep": 0.6, "block": 1})
class EigenAttention(Calibrated, Quantizer):
    """Hold keys and values as coordinates in the directions that carry most of their energy."""

    #: Keys and values are projected, as they are cached.
    changes = ("project",)
    beyond = (
        "score: products are those of the keys' coordinates",
        "aggregate: sums are those of the values' coordinates",
    )
    rotates = True
    one_rotation = True

    everything: ClassVar[dict[str, Any]] = {"keep": 1.0}
    comparable: ClassVar[tuple[str, ...]] = ("(keep=0.75)", "(keep=0.5)")

    keep: float | None = option(
        "share of the bytes of keys and values kept", default=None, above=0, at_most=1,
        kw_only=False,
    )  # fmt: skip
    rank: int | None = option(
        "or directions kept, of keys and of values, in every layer", default=None, at_least=1
    )
    energy: float | None = option(
        "or share of the energy that every layer's keys, and each head's values, keep", default=None,
        above=0, at_most=1,
    )  # fmt: skip
    recent: int = option("newest tokens that stay as they came", default=0, at_least=0)
    block: int = option("tokens that are encoded at once", default=16, at_least=1)

    def setup(self) -> None:
        """Refuse none or several of keep, rank and energy."""
        super().setup()
        exactly_one("eigen attention", keep=self.keep, rank=self.rank, energy=self.energy)
        self.directions: dict[int, tuple[Tensor, Tensor]] = {}

    def calibrator(self) -> Subspaces:
        """The same directions serve every rank."""
        return Subspaces()

    def check(self, model: nn.Module) -> None:
        """Cut the bases to their ranks.

        Raises:
            ValueError: a rank above the width of a head, or a budget that leaves none.
        """
        super().check(model)
        known = self.statistics
        layers = sorted(self.states(self.fresh_layers(model), model))
        missing = [n for n in layers if f"{n}.kq.basis" not in known]
        if missing:
            raise UserError(f"the calibration holds no bases for layer {missing[0]}")
        dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        names = [f"{number}.{what}" for number in layers for what in ("kq", "v")]
        ranks = self.ranks({n: discarded(known[f"{n}.energy"]) for n in names},
                           {n: known[f"{n.split('.')[0]}.v.energy"].shape[0] for n in names})  # fmt: skip
        cut = {n: known[f"{n}.basis"][..., : ranks[n]].to(dtype).contiguous() for n in names}
        self.directions = {n: (cut[f"{n}.kq"], cut[f"{n}.v"]) for n in layers}

    def ranks(
        self, lost: dict[str, Float[Tensor, " dim"]], heads: dict[str, int]
    ) -> dict[str, int]:
        """Directions that each basis keeps.

        Args:
            lost: share of the energy that is lost with 1, 2, … directions, by name.
            heads: how many heads hold coordinates in the basis.
        """
        if self.rank is not None:
            width = min(len(curve) for curve in lost.values())
            if self.rank > width:
                raise UserError(f"rank={self.rank} exceeds the width of a head, {width}")
            return dict.fromkeys(lost, self.rank)
        if self.energy is not None:
            return {n: 1 + int((c[:-1] > 1 - self.energy).sum()) for n, c in lost.items()}
        # One more direction at a time where most is lost: what one threshold for all would give.
        assert self.keep is not None
        room = self.keep * sum(len(c) * heads[n] for n, c in lost.items()) - sum(heads.values())
        if room < 0:
            raise UserError(f"keep={self.keep} leaves less than one direction a head; give more")
        name = [n for n, c in lost.items() for _ in c[:-1]]
        order = torch.cat([c[:-1] for c in lost.values()]).argsort(descending=True, stable=True)
        ranks = dict.fromkeys(lost, 1)
        for number in order.tolist():
            room -= heads[name[number]]
            if room < -1e-6:
                break
            ranks[name[number]] += 1
        return ranks

    def learn(self, state: LayerState, call: Call) -> None:
        """The position of every token, where keys are rotated."""
        if state.rotary is None:
            return
        positions = call.positions.to(torch.int32)
        known = state.tensors.get("positions")
        if known is not None:
            positions = torch.cat([known[:, : call.forward_pass.offset], positions], dim=1)
        state.tensors["positions"] = positions

    def encode(self, state: LayerState, taken: Taken) -> dict[str, Body]:
        """Coordinates of these tokens."""
        bases = self.bases(state)
        positions = None if state.rotary is None else _positions(state.tensors["positions"], taken)
        k, v = bases.encode(taken.k, taken.v, positions)
        return {"low-rank": LowRankBody(k, v, bases, positions, taken.index, taken.first)}

    def bases(self, state: LayerState) -> Bases:
        """Those of a layer."""
        return Bases(*self.directions[state.layer], state.rotary)

    def resume(self, layers: list[object], model: nn.Module) -> None:
        """Go on with a cache that was made before; one out of a file is given its bases.

        Raises:
            ValueError: it was made with other bases.
        """
        super().resume(layers, model)
        for number, state in self.states(layers, model).items():
            for body in getattr(layers[number], "bodies", {}).values():
                if isinstance(body, LowRankBody):
                    body.use(self.bases(state))


def discarded(energy: Float[Tensor, "heads dim"]) -> Float[Tensor, " dim"]:
    """Share of the energy that is lost with 1, 2, … directions, in the head that loses most.

    No direction counts as empty, however few tokens were read: full energy is full rank.
    """
    energy = energy.clamp(min=1e-250)
    behind = torch.nn.functional.pad(energy[:, 1:].flip(-1).cumsum(-1).flip(-1), (0, 1))
    return (behind / energy.sum(dim=-1, keepdim=True)).amax(dim=0)


def _positions(known: Int[Tensor, "batch seen"], taken: Taken) -> Int[Tensor, "batch heads slots"]:
    """Of the tokens taken; one head's where all heads hold the same."""
    if taken.index is None:
        # A copy, since the body grows by itself.
        return known[:, None, taken.first : taken.first + taken.k.shape[2]].clone()
    columns = taken.index.clamp(min=0).long()
    if bool((columns == columns[:, :1]).all()):
        columns = columns[:, :1]
    return known[:, None].expand(-1, columns.shape[1], -1).gather(-1, columns)
