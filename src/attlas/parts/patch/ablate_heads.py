"""Heads taken out, or turned up or down: what a head gives becomes a scaled distance from a constant.

    z'_h = μ_h + scale · (z_h − μ_h)          μ = 0, or the head's mean over some text

scale = 0 ablates (to zero, or to the mean), values below 0 turn a head round, values above 1 enhance it.

Cost: none to speak of. Reduces to the model alone at scale = 1.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.attach.call import Call
from attlas.attach.part import Patch
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.options import option


@mechanism("ablate-heads", paper="")
class AblateHeads(Patch):
    """Scales the outputs of the chosen heads, around zero or around given means."""

    nothing: ClassVar[dict[str, Any] | None] = {"scale": 1.0}

    scale: float = option("of the heads' outputs; 0 ablates them", default=0.0)
    means: Tensor | None = option(
        "what they are scaled around, [layers, heads, value_dim]; zero unless given", default=None
    )

    def check(self, model: nn.Module) -> None:
        """Refuse means of another model."""
        config: Any = model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        wanted = (config.num_hidden_layers, config.num_attention_heads)
        if self.means is not None and tuple(self.means.shape[:2]) != wanted:
            raise UserError(
                f"means are of {list(self.means.shape[:2])} layers and heads, {type(model).__name__} has "
                f"{list(wanted)}"
            )

    def output(
        self, call: Call, heads: Float[Tensor, "batch query heads value_dim"]
    ) -> Float[Tensor, "batch query heads value_dim"]:
        """The heads' outputs, those of the chosen heads scaled."""
        chosen = self.where.over_heads(call.layer, heads.shape[2], heads.device)
        if self.means is None:
            return torch.where(chosen[:, None], self.scale * heads, heads)
        mean = self.means[call.layer].to(heads)
        return torch.where(chosen[:, None], torch.lerp(mean, heads, self.scale), heads)
