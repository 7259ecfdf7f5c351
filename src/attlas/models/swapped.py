"""What a swapped model has in its layers."""

from __future__ import annotations

import inspect
from typing import Any

from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import linear

from attlas.attention import Attention
from attlas.hf.caches import Cache, the_cache
from attlas.models.blocks import only_padding
from attlas.models.packing import Packing, unpacked
from attlas.models.passing import attended, check_mask


class Swapped(nn.Module):
    """A layer of attlas where Transformers expects one of its own."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.layer_idx = attention.layer_idx

    def forward(
        self, hidden_states: Tensor, padding: Tensor | None = None,
        position_ids: Tensor | None = None, cache: Cache | None = None,
        past_key_values: Cache | None = None, packing: Packing | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """The layer's output, and no weights."""
        # With padding, positions are counted from the first valid token, as masks count them.
        positions = position_ids if padding is None else None
        kept = the_cache(cache, past_key_values)
        given = {"mask": padding, "positions": positions, "cache": kept}
        return attended(self.attention, hidden_states, packing, False, **given)[0], None


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
    """Hand padding and packing on to the layers, which Transformers makes into a mask of all pairs."""
    given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
    mask, cache = given.get("attention_mask"), the_cache(given.get("cache"), given.get("past_key_values"))
    if mask is not None and mask.ndim != 2:
        raise ValueError(f"attention_mask must be [batch, keys], got {list(mask.shape)}")
    tokens = given.get("input_ids") if given.get("inputs_embeds") is None else given["inputs_embeds"]
    if tokens is None:
        return args, kwargs  # which Transformers refuses
    check_mask(mask, tokens, cache)
    layers = [m for m in module.modules() if isinstance(m, Swapped)]
    packing, padding, positions = None, only_padding(mask), given.get("position_ids")
    if mask is None and cache is None and positions is not None:
        packing, padding = unpacked(layers, positions, len(tokens))
    if packing is not None:  # Transformers' own layers tell texts apart only where no cache is made
        given["use_cache"] = False
    return (), {**given, "padding": padding, "packing": packing}
