"""Preplan and anchor: where a chain of reasoning looks back far, and what it looks back at later.

    d_h    = mean_t Σ_s A_hts (t − s)          local heads: the 30 % of smallest d; global: of largest
    WAAD_t = mean over local heads of  Σ_s A_hts min(t − s, W)
    FAI_s  = mean over global heads of mean_{s + H_lo ≤ t ≤ min(s + H_hi, T − 1)} A_hts;  0 without such t
    δ_t    = |WAAD_t − WAAD_{t+1}|, 0 at the last token

Heads are those of five layers spread over the middle third. Preplan tokens are those of large δ, anchors
those of large FAI: the largest share q of a response. The credit γ by which advantages are multiplied is

    1                                  elsewhere
    g                                  at anchors
    1 + (1 − α)(g − 1)                 at anchors t with WAAD_t ≤ median, before which one of k tokens has
                                       δ ≥ median: part of their credit goes back
    1 + α (g − 1)                      at the token of largest δ among these k, whatever else it is

Medians are the lower of two middle values. The authors' own training code is not published; the rules
follow a reimplementation where the paper's words leave them open.

Cost: three numbers a head, layer and token. Reduces to the plain policy gradient at g = 1.

Source: "Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained Policy
Optimization".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attlas.attach.call import Call, ForwardPass
from attlas.attach.where import Where
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.options import option
from attlas.parts.record.column_sums import ColumnSums
from attlas.parts.record.rows import RowRecorder

Head = tuple[int, int]


class Rhythm(NamedTuple):
    """Both signals, [batch, tokens] of the response."""

    waad: Float[Tensor, "batch response"]
    fai: Float[Tensor, "batch response"]


def middle_layers(layers: int, count: int) -> list[int]:
    """`count` layers evenly over the middle third, its ends included; all of it where it has fewer."""
    low, high = layers // 3, min(2 * layers // 3, layers - 1)
    if high - low + 1 <= count:
        return list(range(low, high + 1))
    if count == 1:
        return [(low + high) // 2]
    return [low + round(i * (high - low) / (count - 1)) for i in range(count)]


@mechanism(
    "preplan-anchor",
    example={"nearest": 2, "farthest": 6, "layers": [0, 1, 2, 3, 4, 5]},
)
class PreplanAnchor(RowRecorder):
    """Records how far each query looks back, and how much later queries look at each token.

    The result is {"distance", "windowed", "future": [layers, batch, heads, tokens]} of the layers looked
    at; `heads_by_distance` ranks the heads and `rhythm` averages over them.
    """

    window: int = option("distance at which WAAD is clipped, W", default=10, at_least=1)
    nearest: int = option("how much later the first query that counts for FAI is", default=10, at_least=0)
    farthest: int = option("how much later the last one is", default=50, at_least=0)
    share: float = option("of the heads that are local, and global", default=0.3, above=0, at_most=0.5)
    sampled: int = option("layers of the middle third, where no layers are given", default=5, at_least=1)

    def setup(self) -> None:
        """Nothing is recorded yet.

        Raises:
            ValueError: a window of later queries that ends before it begins.
        """
        super().setup()
        if self.farthest < self.nearest:
            raise UserError(
                f"farthest must be at least nearest={self.nearest}, got {self.farthest}"
            )
        self._future = ColumnSums()
        self._valid: Bool[Tensor, "batch seen"] | None = None

    def check(self, model: nn.Module) -> None:
        """Choose layers of the middle third where none are given."""
        if self.layers is None and not isinstance(self.heads, dict):
            config: Any = getattr(model, "config", None)
            config = config.get_text_config() if hasattr(config, "get_text_config") else config
            count = getattr(config, "num_hidden_layers", None)
            if count is not None:
                self.where = Where(middle_layers(count, self.sampled), self.heads)

    def begin(self, forward_pass: ForwardPass) -> None:
        """A call without a past begins a new sequence."""
        super().begin(forward_pass)
        self._future.begin(forward_pass)
        valid, seen = forward_pass.valid, forward_pass.offset + forward_pass.length
        self._valid = None if valid is None else valid[:, :seen]

    def take_back(self, seen: int) -> None:
        """Forget tokens behind the first `seen`."""
        super().take_back(seen)
        self._future.take_back(seen)
        self._valid = None if self._valid is None else self._valid[:, :seen]

    def update(self, call: Call, weights: Tensor, queries: Tensor, keys: Tensor) -> None:
        """Distances of a block's queries, and what they give the tokens long before them."""
        super().update(call, weights, queries, keys)
        back = queries[:, None] - keys[..., None, :]
        later = (back >= self.nearest) & (back <= self.farthest)
        self._future.update(call, weights * later, queries, keys)

    def measure(
        self, call: Call, weights: Tensor, queries: Tensor, keys: Tensor
    ) -> Float[Tensor, "batch heads query 2"]:
        """Σ A (t − s) and Σ A min(t − s, W)."""
        back = (queries[:, None] - keys[..., None, :]).clamp(min=0).to(weights.dtype)
        sums = [(weights * far).sum(dim=-1) for far in (back, back.clamp(max=self.window))]
        return torch.stack(sums, dim=-1)

    def result(self) -> dict[str, Float[Tensor, "layers batch heads tokens"]]:
        """Of every head."""
        rows: Tensor = super().result()
        future = self._future.result()[..., self._first :]
        return {
            "distance": rows[..., 0], "windowed": rows[..., 1],
            "future": future / self._counts(future).clamp(min=1),
        }  # fmt: skip

    def _counts(self, future: Tensor) -> Float[Tensor, "#batch 1 tokens"]:
        """How many queries stand between `nearest` and `farthest` behind each token."""
        tokens = future.shape[-1]
        there = self._there(tokens).to(future.device)
        before = torch.nn.functional.pad(there.to(future.dtype).cumsum(-1), (1, 0))
        at = torch.arange(tokens, device=future.device)
        first, stop = ((at + far).clamp(max=tokens) for far in (self.nearest, self.farthest + 1))
        return (before[:, stop] - before[:, first])[:, None]

    def _there(self, tokens: int) -> Bool[Tensor, "#batch tokens"]:
        if self._valid is None:
            return torch.ones(1, tokens, dtype=torch.bool)
        return self._valid[:, -tokens:]

    def heads_by_distance(self) -> list[Head]:
        """(layer, head) of those looked at, the one that looks nearest first; all texts together."""
        rows = self.result()["distance"]
        there = self._there(rows.shape[-1]).to(rows.device)[None, :, None]
        mean = (rows * there).sum(dim=(1, 3)) / there.expand_as(rows[:1, :, :1]).sum().clamp(min=1)
        found = []
        for i, layer in enumerate(sorted(self._rows)):
            own = self.where.heads_of(layer) or range(rows.shape[2])
            found += [(float(mean[i, j]), layer, head) for j, head in enumerate(own)]
        return [(layer, head) for _, layer, head in sorted(found)]

    def local_and_global(self) -> tuple[list[Head], list[Head]]:
        """The heads of smallest and of largest mean distance, at least one of each."""
        ranked = self.heads_by_distance()
        count = max(1, int(len(ranked) * self.share))
        return ranked[:count], ranked[-count:]

    def rhythm(
        self,
        response: int = 0,
        heads: tuple[list[Head], list[Head]] | None = None,
    ) -> Rhythm:
        """WAAD and FAI of the tokens from column `response` on.

        Args:
            response: where the response begins.
            heads: local and global ones, say those of other texts; `local_and_global()` unless given.
        """
        local, far = self.local_and_global() if heads is None else heads
        found = self.result()
        waad, fai = self._over(found["windowed"], local), self._over(found["future"], far)
        return Rhythm(waad[:, response:], fai[:, response:])

    def _over(self, values: Tensor, heads: list[Head]) -> Float[Tensor, "batch tokens"]:
        """The mean over some heads.

        Raises:
            ValueError: one that was not looked at.
        """
        layers = sorted(self._rows)
        places = []
        for layer, head in heads:
            own = self.where.heads_of(layer) if layer in layers else ()
            own = tuple(range(values.shape[2])) if own is None else own
            if head not in own:
                raise UserError(f"heads names head {head} of layer {layer}, which was not looked at")
            places.append(values[layers.index(layer), :, own.index(head)])
        return torch.stack(places).mean(dim=0)


def credit(
    waad: Float[Tensor, " response"],
    fai: Float[Tensor, " response"],
    *,
    top: float = 0.4,
    gain: float = 1.5,
    back: float = 0.5,
    reach: int = 3,
) -> Float[Tensor, " response"]:
    """The factors γ of one response's advantages; ones for fewer than three tokens.

    Args:
        waad: windowed distances of its tokens.
        fai: influences of its tokens.
        top: share q of the tokens that are anchors.
        gain: factor g of an anchor.
        back: share α of the gain that a dominated anchor gives to the token that introduces it.
        reach: how many tokens before it are looked at, k.

    Raises:
        ValueError: signals of different lengths, or a share outside [0, 1].
    """
    if waad.shape != fai.shape:
        raise UserError(f"waad has {len(waad)} tokens and fai {len(fai)}; both are of one response")
    for name, share in (("top", top), ("back", back)):
        if not 0 <= share <= 1:
            raise UserError(f"{name} must lie in [0, 1], got {share}")
    gamma = torch.ones_like(waad)
    if len(waad) < 3:
        return gamma
    delta = torch.cat([waad.diff().abs(), waad.new_zeros(1)])
    anchors = fai >= torch.quantile(fai, 1 - top)
    gamma[anchors] = gain
    introducing = []
    for t in (anchors & (waad <= waad.median())).nonzero().flatten().tolist():
        before = delta[max(0, t - reach) : t]
        if len(before) and before.max() >= delta.median():
            gamma[t] = 1 + (1 - back) * (gain - 1)
            introducing.append(max(0, t - reach) + int(before.argmax()))
    gamma[introducing] = 1 + back * (gain - 1)
    return gamma


def weighted_advantages(
    advantages: Float[Tensor, "batch response"],
    rhythm: Rhythm,
    valid: Bool[Tensor, "batch response"] | None = None,
    *,
    top: float = 0.4,
    gain: float = 1.5,
    back: float = 0.5,
    reach: int = 3,
) -> Float[Tensor, "batch response"]:
    """Advantages times each row's γ: what a policy gradient then multiplies log-probabilities by.

    Args:
        advantages: of each token of the responses.
        rhythm: of the same tokens.
        valid: which of them are no padding; the others' advantages stay.
        top: as in `credit`, likewise `gain`, `back` and `reach`.
    """
    gamma = torch.ones_like(advantages)
    for row in range(len(advantages)):
        there = slice(None) if valid is None else valid[row]
        found = credit(
            rhythm.waad[row, there], rhythm.fai[row, there], top=top, gain=gain, back=back, reach=reach
        )
        gamma[row, there] = found.to(gamma)
    return advantages * gamma
