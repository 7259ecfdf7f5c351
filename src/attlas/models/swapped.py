"""What a swapped model has in its layers."""

from __future__ import annotations

from typing import Any

from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import linear

from attlas.attention import Attention
from attlas.hf.caches import Cache, the_cache
from attlas.models.blocks import only_padding


class Swapped(nn.Module):
    """A layer of attlas where Transformers expects one of its own."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.layer_idx = attention.layer_idx

    def forward(
        self, hidden_states: Tensor, padding: Tensor | None = None,
        position_ids: Tensor | None = None, cache: Cache | None = None,
        past_key_values: Cache | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """The layer's output, and no weights."""
        # With padding, positions are counted from the first valid token, as masks count them.
        positions = position_ids if padding is None else None
        kept = the_cache(cache, past_key_values)
        return self.attention(hidden_states, mask=padding, positions=positions, cache=kept), None


class NormedLinear(nn.Linear):
    """A projection whose heads are normalised, as in Qwen3."""

    def __init__(self, plain: nn.Linear, norm: nn.Module, width: int) -> None:
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None)
        self.weight, self.bias, self.norm, self.width = plain.weight, plain.bias, norm, width

    def forward(self, x: Tensor) -> Tensor:
        """Projected, and each head normalised."""
        heads = rearrange(linear(x, self.weight, self.bias), "... (h d) -> ... h d", d=self.width)
        normed: Tensor = rearrange(self.norm(heads), "... h d -> ... (h d)")
        return normed


def pass_padding(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hand the padding mask on to the layers, which Transformers makes into one of all pairs."""
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if mask is not None and mask.ndim != 2:
        raise ValueError(f"attention_mask must be [batch, keys], got {list(mask.shape)}")
    return args, {**kwargs, "padding": only_padding(mask)}
