"""SinkLoRA: tune a model on long texts in groups of tokens, by low-rank differences; test it whole.

    visible(h, q, k) = k ≤ q  and  (k < sinks  or  ⌊(q + s_h)/g⌋ = ⌊(k + s_h)/g⌋)

in training, g being the tokens of a group. The first half of the heads has s = 0. The second half is
shifted by half a group, s = g/2, so that what groups know passes on, but for the share `returned` of
them, the first of that half, which go back to s = 0. The first tokens, `sinks`, are seen by all. In
evaluation attention is the model's own.

    W ← W + (α / rank) B A        of the query, key, value and output projections; B starts at 0

is trained, and the model's own embeddings and norms, as in LongLoRA, whose attention this repairs: its
shift rolls the text around, so that its first g/2 tokens see its last ones; here none sees a later one.

Cost: about n · g / 2 pairs for n tokens instead of n² / 2. Masks are dense here, so that a step of
training saves no time by it yet. Merged, it costs what the model costs.
Reduces to tuning by low-rank differences at g = n, to shifted sparse attention at sinks = returned = 0.

What this rests on: the paper's abstract and the code that it points to, which is LongLoRA's and does not
hold this attention. That whole heads are put back, and which, is the catalogue's and our reading; their
share and the number of sinks are not known and chosen here. The paper decodes with a cache of heavy
hitters, as `observed-attention` does.
Source: "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from attlas import masks, mechanism
from attlas.errors import UserError
from attlas.kinds.injection import Injection
from attlas.kinds.masked import Masked, Tokens
from attlas.masks import Mask
from attlas.masks.algebra import Reach
from attlas.options import option

#: Projections that get low-rank differences.
TUNED = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, repr=False)
class _Groups(Mask):
    """Tokens of a group, shifted by half a group in the heads from `first` on."""

    size: int
    first: int
    heads: int
    tensors = ()
    leaves = ()

    def _group(self, h: Tensor, at: Tensor) -> Tensor:
        return (at + (h >= self.first) * (self.size // 2)) // self.size

    def visible(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self._group(h, q) == self._group(h, k)

    def reach(self, q_lo: Tensor, q_hi: Tensor, k_lo: Tensor, k_hi: Tensor) -> Reach:
        h = torch.arange(self.heads, device=q_lo.device)[:, None, None]
        (q0, q1), (k0, k1) = ((self._group(h, x) for x in ends) for ends in ((q_lo, q_hi), (k_lo, k_hi)))
        return (q0 <= k1) & (k0 <= q1), (q0 == q1) & (k0 == k1) & (q0 == k0)

    def __repr__(self) -> str:
        return f"groups({self.size}, shifted from head {self.first} of {self.heads})"


def groups(size: int, heads: int, *, returned: float = 0.0, sinks: int = 0) -> Mask:
    """Each token sees its group up to itself, and sinks.

    Args:
        size: tokens of a group.
        heads: query heads, of which the second half is shifted.
        returned: share of that half that is not, rounded to whole heads.
        sinks: first tokens that all see.
    """
    half = heads - heads // 2
    seen: Mask = _Groups(size, heads // 2 + round(returned * half), heads)
    return masks.causal & (seen | masks.sinks(sinks) if sinks else seen)


class LowRank(nn.Module):
    """A projection and its low-rank difference, which starts at 0."""

    def __init__(self, old: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.old, self.scale = old, alpha / rank
        self.a = nn.Parameter(torch.empty(rank, old.in_features).to(old.weight))
        self.b = nn.Parameter(old.weight.new_zeros(old.out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    @property
    def weight(self) -> Tensor:
        """Of both together."""
        return self.old.weight + self.scale * self.b @ self.a

    def forward(self, x: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows outer"]:
        """The projection of both."""
        found: Tensor = self.old(x) + self.scale * linear(linear(x, self.a), self.b)
        return found


@mechanism("sinklora", paper="sinklora", example={"group": 8})
class SinkLoRA(Masked):
    """SinkLoRA: groups of tokens in training, low-rank differences, full attention at test."""

    changes: ClassVar[tuple[str, ...]] = ("mask",)

    group: int | None = option(
        "tokens of a group; a quarter of the text, as published, unless given", default=None, at_least=1
    )
    sinks: int = option("first tokens that all see", default=4, at_least=0)
    returned: float = option("share of the shifted heads put back", default=0.5, at_least=0, at_most=1)
    rank: int = option("of the differences", default=8, at_least=1)
    alpha: float = option("the differences are scaled by alpha / rank", default=16.0, above=0)

    def check(self, model: Any) -> None:
        """Refuse models whose projections are not told apart, or are not plain.

        Raises:
            ValueError: naming the projection and the family.
        """
        super().check(model)
        for name in TUNED:
            found = [m for n, m in model.named_modules() if n.endswith(f"self_attn.{name}")]
            if not found or not all(type(module) is nn.Linear for module in found):
                raise UserError(
                    f"{self.name} tunes {name} of every layer, and {model.config.model_type} has no "
                    "plain one; inject it before what changes projections, and into unquantized models"
                )

    def change(self, injection: Injection) -> None:
        """Low-rank differences beside the projections, and groups in the calls of training."""
        super().change(injection)
        for name, module in list(injection.model.named_modules()):
            if isinstance(module, nn.Linear) and name.endswith(tuple(f"self_attn.{t}" for t in TUNED)):
                injection.replace(name, LowRank(module, self.rank, self.alpha))
        config = injection.model.config.get_text_config(decoder=True)
        self.heads: int = config.num_attention_heads

    def pattern(self, tokens: Tokens) -> Mask | None:
        """Groups while the model is trained.

        Raises:
            ValueError: training with a cache, or with padding before the text.
        """
        if not tokens.training:
            return None
        if tokens.offset:
            raise UserError(f"{self.name} trains on whole texts, and the cache holds some; call eval()")
        if tokens.valid is not None and not bool(tokens.valid[:, 0].all()):
            raise UserError(
                f"{self.name} counts groups from the first token, which is padding; pad on the right"
            )
        size = -(-tokens.length // 4) if self.group is None else self.group
        if size >= tokens.length:
            return None
        return groups(size, self.heads, returned=self.returned, sinks=self.sinks)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The differences, and the model's own embeddings and norms."""
        injection = self._injected("trainable()")
        found = {
            f"{path}.{name}": getattr(new, name)
            for path, (_, new) in injection.replaced.items() for name in ("a", "b")
        }  # fmt: skip
        return found | self._own()

    def folded(self) -> dict[str, Tensor]:
        """Differences added to the projections, embeddings and norms as they are."""
        injection = self._injected("merge()")
        found: dict[str, Tensor] = dict(self._own())
        for path, (_, new) in injection.replaced.items():
            assert isinstance(new, LowRank)
            found[f"{path}.weight"] = new.weight
        return found

    def _own(self) -> dict[str, nn.Parameter]:
        model = self._injected("trainable()").model
        table = model.get_input_embeddings().weight
        return {
            name: weight for name, weight in model.named_parameters()
            if weight is table or "norm" in name.rpartition(".")[0].rpartition(".")[2]
        }  # fmt: skip
