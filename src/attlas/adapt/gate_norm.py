"""Gate-Norm: remove the attention sublayers whose queries and keys are coupled least, without data.

    score²(layer) = Σ_h ‖ W_Qʰ W_Kʰᵀ ‖²_F = Σ_h tr( (W_Qʰᵀ W_Qʰ) (W_Kʰᵀ W_Kʰ) )

W_Qʰ, W_Kʰ are a head's dim × dim_head projections, and a key head that serves several query heads counts
with each of them. The right-hand side needs two dim_head × dim_head products a head and never the
dim × dim one. The layers of lowest score lose attention and the norm before it; the residual passes,
and the MLP stays:

    x ← x + Attn(Norm(x))   becomes   x ← x

Cost: reading the query and key weights once. A removed layer computes nothing and caches no key.
Removing 0 layers is the model itself.

What this rests on: the paper's abstract (arXiv 2512.20636) ranks attention sublayers by query-key
coupling from weights alone, removes the least coupled, and finds these to be deep layers; no code was
found. That the coupling is this norm, with heads summed in squares, is the catalogue's reading.
Whether the gain G of the norm before attention is folded in, W ← G W, is not known; the catalogue
folds it (`gains=True`). On SmolLM2-135M, whose first norm has gains of 0.001, that removes the first
layers and costs far more than random choices; without gains the deepest go, as in the paper, so that is
the default here. docs/adapt.md has the numbers. Biases of the projections (Qwen2) and rotary positions do
not enter the score.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from attlas import mechanism
from attlas.errors import UserError, exactly_one
from attlas.hf.caches import Cache, DynamicLayer, the_cache
from attlas.kinds.adapter import Adapter
from attlas.kinds.injection import Injection
from attlas.options import option

#: Model types in whose layers attention has a norm, projections and a residual path to itself.
FAMILIES = ("llama", "mistral", "qwen2")


def coupling(
    query: Float[Tensor, "query_rows dim"], key: Float[Tensor, "key_rows dim"], width: int
) -> Float[Tensor, ""]:
    """The score of one layer.

    Args:
        query: weights of the query projection, heads of `width` rows.
        key: weights of the key projection, of as many heads or a divisor of them.
        width: of a head.
    """
    q, k = (rearrange(w.detach().float(), "(h d) x -> h d x", d=width) for w in (query, key))
    k_gram = repeat(k @ k.mT, "h d e -> (h g) d e", g=len(q) // len(k))
    return ((q @ q.mT) * k_gram).sum().clamp(min=0).sqrt()  # both are symmetric: tr(A B) = Σ A ∘ B


@mechanism("gate-norm", paper="gate-norm", example={"layers": 2})
class GateNorm(Adapter):
    """Gate-Norm: removes attention sublayers by a score of their weights."""

    nothing: ClassVar = {"layers": 0}

    layers: int | None = option("how many lose attention", default=None, at_least=0, kw_only=False)
    share: float | None = option(
        "or which share of all layers, rounded to a whole number; the paper removes 8 to 16 of 40",
        default=None, at_least=0, below=1, kw_only=False,
    )  # fmt: skip
    gains: bool = option(
        "fold the gains of the norm before attention into the score", default=False
    )

    def setup(self) -> None:
        """Refuse both numbers and none."""
        super().setup()
        exactly_one("gate-norm", layers=self.layers, share=self.share)

    def check(self, model: Any) -> None:
        """Refuse other families, and a number that leaves no layer with attention.

        Raises:
            ValueError: naming what the model is or has.
        """
        family = model.config.model_type
        if family not in FAMILIES:
            raise UserError(
                f"gate-norm takes models of {list(FAMILIES)}, whose attention has projections, a norm "
                f"and a residual path of its own, got {family!r}"
            )
        layers = model.base_model.layers
        if self._count(len(layers)) >= len(layers):
            raise UserError(
                f"layers={self._count(len(layers))}: at least one of the model's {len(layers)} layers "
                "must keep attention"
            )
        for number, layer in enumerate(layers):
            attention = layer.self_attn
            for name in ("q_proj", "k_proj", "o_proj"):
                if not isinstance(getattr(attention, name, None), nn.Linear):
                    raise UserError(
                        f"gate-norm reads the weights of {name}, and layer {number} has no plain one; "
                        "inject it before what changes projections, and into unquantized models"
                    )

    def scores(self, model: Any) -> Float[Tensor, " layers"]:
        """‖W_Q W_Kᵀ‖_F of each layer; the lowest go first.

        Raises:
            ValueError: as `check`.
        """
        self.check(model)
        found = []
        for layer in model.base_model.layers:
            attention, gain = layer.self_attn, layer.input_layernorm.weight if self.gains else 1.0
            query, key = attention.q_proj.weight * gain, attention.k_proj.weight * gain
            found.append(coupling(query, key, attention.head_dim).cpu())
        return torch.stack(found)

    def change(self, injection: Injection) -> None:
        """Remove attention and its norm from the layers of lowest score, or from those saved."""
        model = injection.model
        if self.saved is None:
            scores = self.scores(model)
            found = scores.argsort(stable=True)[: self._count(len(scores))]
        else:
            found = self.saved["removed"]
        self.removed: list[int] = sorted(found.tolist())
        prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
        for number in self.removed:
            mate = self._mate(model.config, number)
            injection.replace(f"{prefix}layers.{number}.self_attn", Removed(number, mate))
            injection.replace(f"{prefix}layers.{number}.input_layernorm", nn.Identity())

    def difference(self) -> dict[str, Tensor]:
        """The numbers of the layers without attention."""
        return {"removed": torch.tensor(self.removed, dtype=torch.int64)}

    def folded(self) -> dict[str, Tensor]:
        """Output projections of 0: the same logits in the model's own class, at its full cost."""
        assert self.injection is not None
        return {
            f"{path}.o_proj.{name}": torch.zeros_like(parameter)
            for path, (old, _) in self.injection.replaced.items() if path.endswith(".self_attn")
            for name, parameter in old.get_submodule("o_proj").named_parameters()
        }  # fmt: skip

    def _count(self, total: int) -> int:
        return round((self.share or 0.0) * total) if self.layers is None else self.layers

    def _mate(self, config: Any, number: int) -> int:
        """A layer with attention of the same type: it tells how many tokens were read.

        Raises:
            ValueError: there is none.
        """
        types = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
        for other, kind in enumerate(types):
            if kind == types[number] and other not in self.removed:
                return other
        raise UserError(f"layers={len(self.removed)} would leave no layer of {types[number]}")


class Removed(nn.Module):
    """Stands where attention was: adds nothing to the residual, and keeps nothing in the cache."""

    def __init__(self, layer_idx: int, mate: int) -> None:
        super().__init__()
        self.layer_idx, self.mate = layer_idx, mate

    def forward(
        self, hidden_states: Tensor, cache: Cache | None = None,
        past_key_values: Cache | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Zeros, of no memory."""
        kept = the_cache(cache, past_key_values)
        if kept is not None:
            if (
                len(kept.layers) == self.layer_idx
            ):  # one made without a config grows as it is filled
                kept.layers.append(NoKeys(kept, self.mate))
            elif not isinstance(kept.layers[self.layer_idx], NoKeys):
                kept.layers[self.layer_idx] = NoKeys(kept, self.mate)
        return hidden_states.new_zeros(1).expand_as(hidden_states), None


class NoKeys(DynamicLayer):  # type: ignore[misc]
    """The cache layer of a removed attention: it holds nothing.

    Transformers asks the first layer how many tokens a cache has seen and how large masks are, so one
    that is never updated would say 0 for ever. This one says what a layer with attention says.
    """

    supports_early_init = False

    def __init__(self, cache: Cache, mate: int) -> None:
        super().__init__()
        self.cache, self.mate = cache, mate

    @property
    def _other(self) -> Any:
        layers = self.cache.layers
        return layers[self.mate] if self.mate < len(layers) else DynamicLayer()

    @property
    def is_sliding(self) -> bool:
        """Whether the layers of its type hold a window alone."""
        return bool(getattr(self._other, "is_sliding", False))

    @property
    def is_compileable(self) -> bool:
        """Whether the layers of its type are of fixed size; masks are made otherwise for these."""
        return bool(self._other.is_compileable)

    @property
    def is_croppable(self) -> bool:
        """Whether the layers of its type can forget their last tokens."""
        return bool(getattr(self._other, "is_croppable", True))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Refused.

        Raises:
            ValueError: the cache was filled without this layer's attention, which is back now.
        """
        raise UserError(
            "this cache was filled while gate-norm had removed a layer's attention, and lacks its keys; "
            "read the prompt anew"
        )

    def get_seq_length(self) -> int:
        """Tokens that the cache has seen."""
        seen: int = self._other.get_seq_length()
        return seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys of the layers of its type."""
        length, offset = self._other.get_mask_sizes(query_length)
        return length, offset

    def get_max_length(self) -> int:
        """Of the layers of its type."""
        most: int = self._other.get_max_length()
        return most

    def reset(self) -> None:
        """Nothing to forget."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Nothing to reorder."""

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing to crop."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Nothing to repeat."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Nothing to select."""
