"""Loki: keys lie in few dimensions, and in these the largest logits are found cheaply.

    P_r   = the first r principal components of a key head's keys, from calibration
    ŝ_j   = (q P_r) · (k_j P_r)
    read  = for each query head the tokens of largest ŝ, and those too new to be packed; both exactly

Components are those of keys after rotation, or before it; logits are of rotated queries and keys in
both cases, and means are subtracted for the components alone, as in the authors' code.

The paper keeps keys in the basis of all components, whose first r channels are then there to be read.
Here keys stay as they are, so that bodies, kernels and other parts read them as ever, and k P_r is held
beside them: r / 2d more bytes.

Cost: r numbers a token and key head are read; then the chosen keys and values. Reads all tokens, hence
reduces to full attention, at keep = 1; at r = the head's width ŝ is the logit itself, but for its scale.

Source: "Loki: Low-Rank Keys for Efficient Sparse Attention".
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.attach.call import Call
from attlas.cache.rotations import look, rotation_of
from attlas.cache.selection import PortionSelection, keys_of, lengths_of
from attlas.cache.summaries import best_portion, extend
from attlas.calibration import Calibrated, Calibrator
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.ops.reference import grouped_product
from attlas.options import option
from attlas.storage.body import Body
from attlas.storage.layer import Chosen, LayerState
from attlas.storage.rotary import Rotation

NAME = "loki-low-rank-keys"


class KeyComponents(Calibrator):
    """Principal components of the keys of every layer and key head.

    C = E[k kᵀ] − E[k] E[k]ᵀ = P Λ Pᵀ,   λ_1 ≥ λ_2 ≥ …
    """

    rotary: Literal["after", "before"] = option(
        "whether keys are taken after their rotation or before it", kw_only=False
    )

    def setup(self) -> None:
        """Nothing is known of the model yet."""
        super().setup()
        self.rotations: dict[int, Rotation | None] = {}

    def check(self, model: nn.Module) -> None:
        """Learn how the model rotates.

        Raises:
            ValueError: in a way that cannot be undone.
        """
        config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
        if self.rotary == "before":
            look(model)
            who, count = type(self).__name__, config.num_hidden_layers
            self.rotations = {i: rotation_of(model, i, who) for i in range(count)}

    def observe(self, call: Call) -> None:
        """Sum up k and k kᵀ over valid tokens."""
        k = call.k[:, :, -call.q.shape[2] :]
        if (rotation := self.rotations.get(call.layer)) is not None:
            k = rotation.now().unrotate(k, call.positions)
        k, count = k.double(), torch.tensor(k.shape[0] * k.shape[2])
        if (valid := call.valid) is not None:
            k, count = k * valid[:, None, :, None], valid.sum()
        self.add(f"{call.layer}.outer", torch.einsum("bhnd,bhne->hde", k, k))
        self.add(f"{call.layer}.sum", k.sum((0, 2)))
        self.add(f"{call.layer}.count", count.reshape(1))

    def tensors(self) -> dict[str, Tensor]:
        """For each layer `components` [kv_heads, dim, dim], in columns, and their `variance`."""
        found: dict[str, Tensor] = {}
        for name in (n.removesuffix(".count") for n in self.sums if n.endswith(".count")):
            count = float(self.sums[f"{name}.count"])
            mean = self.sums[f"{name}.sum"] / count
            spread = self.sums[f"{name}.outer"] / count - mean[:, :, None] * mean[:, None]
            variance, components = torch.linalg.eigh(spread)
            found[f"{name}.components"] = components.flip(-1).float()
            found[f"{name}.variance"] = variance.flip(-1).clamp(min=0).float()
        if not found:
            raise UserError("no key was seen; calibrate on at least one text")
        return found


@mechanism("loki-low-rank-keys", aliases=("loki",), example={"keep": 0.5, "rank": 0.5, "block": 2})
class Loki(Calibrated, PortionSelection):
    """Read the tokens whose keys' principal components go best with the query's."""

    #: Approximate logits choose which pairs meet.
    changes = ("score", "mask")
    without = ("page",)
    everything: ClassVar[dict[str, Any]] = {"keep": 1.0}
    chooses_on_device: ClassVar[bool] = True
    comparable: ClassVar[tuple[str, ...]] = (
        "(keep=0.25)", "(keep=0.125)", "(keep=0.25, rank=0.5)", "(keep=0.125, rank=0.5)",
    )  # fmt: skip

    rank: float | int = option(
        "components that choose: a share of the head's width, as 0.25, or a number, as 16",
        default=0.25, above=0,
    )  # fmt: skip
    rotary: Literal["after", "before"] = option(
        "components of keys after their rotation or before it", default="after"
    )
    block: int = option("tokens that are packed at once", default=16, at_least=1)

    def setup(self) -> None:
        """Refuse a share above the whole."""
        super().setup()
        if isinstance(self.rank, float) and self.rank > 1:
            raise UserError(f"rank must be a share in (0, 1] or a whole number, got {self.rank}")

    @property
    def calibration_key(self) -> str:
        """Components before the rotation are others than those after it."""
        return NAME if self.rotary == "after" else f"{NAME},rotary={self.rotary}"

    def calibrator(self) -> Calibrator:
        """Principal components of keys."""
        return KeyComponents(self.rotary)

    def check(self, model: nn.Module) -> None:
        """Find the components, and refuse a rank above the width of a head."""
        super().check(model)
        dim = next(t for n, t in self.statistics.items() if n.endswith("components")).shape[-1]
        if not isinstance(self.rank, float) and self.rank > dim:
            raise UserError(
                f"rank={self.rank} is more than the {dim} channels of this model's heads"
            )

    def components(self, layer: int, like: Tensor) -> Float[Tensor, "kv_heads dim rank"]:
        """The first components of a layer, beside a tensor and in its type."""
        whole = self.statistics[f"{layer}.components"]
        dim = whole.shape[-1]
        rank = max(1, int(dim * self.rank)) if isinstance(self.rank, float) else self.rank
        return whole[..., :rank].to(like)

    def summarize(self, state: LayerState, body: Body) -> None:
        """The first components of each new key."""

        def codes(rows: slice, start: int, stop: int) -> dict[str, Tensor]:
            keys = keys_of(body, start, stop)[rows]
            return {"codes": keys @ self.components(state.layer, keys)}

        extend(state, body, 1, ("codes",), codes)

    def choose(self, state: LayerState, body: Body, call: Call) -> Chosen | None:
        """The tokens of largest approximate logit."""
        codes = state.tensors["codes"]
        components = self.components(state.layer, codes)
        grouped = call.q[:, :, 0].to(codes.dtype).unflatten(1, (codes.shape[1], -1))
        queries = (grouped @ components).flatten(1, 2)[:, :, None]
        scores = grouped_product(queries, codes.mT)[:, :, 0]
        read = codes.nbytes
        return Chosen(best_portion(scores, self.portion, lengths_of(body)), 1, body.slots, read)
