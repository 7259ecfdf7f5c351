"""GUI-KV: of a history of screenshots, keep what stands out in the last one and is new in the others.

To SnapKV's scores, summed over the window's queries, for the tokens before the window,

    spatial:   score(j) += α softmax_j( (‖x_j‖ − μ)/(σ + ε) / τ )     for the last image's tokens j
    temporal:  score(j)  = 0     for the ⌊(1 − n/T) m⌋ of the m tokens of earlier images with the
               smallest ‖k_j − Q Qᵀ k_j‖

where x is what the layer's attention is given, μ and σ are the mean and spread of the norms, and Q is
the basis of the first r of the last image's keys by QR: what lies in its span has been shown again.
Keys are taken as cached. A basis as wide as a head explains everything, and tells nothing.

Cost: SnapKV's, and a QR of d × r a head. Keeps everything, hence reduces to full attention, at
keep = 1; without images to SnapKV.

Source: "GUI-KV: Efficient GUI Agents via KV Cache with Spatio-Temporal Awareness". α = 2, τ = 3.5 and
w = 8 are those of all five of the authors' evaluation programs; their class alone begins with 0.1, 1 and
64. Heads of a group share their keys here, so their attention is averaged; published code repeats the
keys instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attlas.attach.call import Call
from attlas.cache.policy import Slots
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.options import option
from attlas.parts.evict.snapkv import SnapKV
from attlas.storage.layer import LayerState


@mechanism("gui-kv", example={"keep": 0.5, "window": 4, "images": ((2, 8), (10, 16))})
class GuiKV(SnapKV):
    """Keep what the last queries read, what stands out on the last screen and what it does not show."""

    wants_hidden = True
    #: Images and states are those of the prompt.
    without = ("while_decoding",)
    beyond = ("mask: later queries do not meet the keys that were dropped",)

    images: Sequence[tuple[int, int]] | None = option(
        "(first token, token behind the last) of each image, in order, padding not counted; the same in "
        "every row", default=None,
    )  # fmt: skip
    image_token: int | None = option(
        "or the id that stands for images in `input_ids`; a run of it is an image", default=None
    )
    alpha: float = option("weight of the spatial score", default=2.0)
    temperature: float = option("temperature of the spatial score's softmax", default=3.5, above=0)
    kernel: int = option("width of the pooling along positions, odd", default=5, at_least=1)
    pooling: Literal["avg", "max"] = option("how neighbours are pooled", default="avg")
    window: int = option("how many of the last queries are asked", default=8, at_least=1)
    rank: int = option("most columns of the basis", default=32, at_least=1)

    def setup(self) -> None:
        """Refuse spans that overlap, and neither or both of `images` and `image_token`."""
        super().setup()
        if (self.images is None) == (self.image_token is None):
            raise UserError("give either images= (spans of tokens) or image_token= (an id)")
        _check_spans(self.images or ())

    def learn(self, state: LayerState, call: Call) -> None:
        """The last queries, and how long what the layer was given is; with ids, which are images."""
        super().learn(state, call)
        if call.hidden is None:
            raise UserError(
                f"GuiKV needs the hidden states that {type(call.module).__name__} is given, which it "
                "does not take as hidden_states"
            )
        fresh = {"norms": call.hidden.float().norm(dim=-1)}
        if self.image_token is not None:
            if call.forward_pass.ids is None:
                raise UserError("image_token needs input_ids; with inputs_embeds give images=")
            fresh["shown"] = call.forward_pass.ids.to(call.q.device) == self.image_token
        for name, new in fresh.items():
            known = state.tensors.get(name)
            state.tensors[name] = new if known is None else torch.cat([known, new], dim=1)

    def scores(self, state: LayerState, slots: Slots) -> Float[Tensor, "batch kv_heads slots"]:
        """Attention of the last queries, with both terms; the queries' own tokens above all others."""
        asked = (state.tensors["columns"] >= 0).sum(dim=-1)
        window = slots.rank >= (slots.total - asked)[:, None, None]
        scores = super().scores(state, slots) * asked[:, None, None]
        scores = scores.masked_fill(window | ~slots.valid, 0.0)
        for row in range(len(scores)):
            there = slots.valid[row, 0].nonzero()[:, 0]
            number = self._numbers(state, row, there)
            self._spatial(scores[row], there[number == 1], state.tensors["norms"][row])
            pruned = 1.0 - int(slots.budget[row]) / int(slots.total[row])
            earlier = there[number > 1]
            self._temporal(scores[row], slots.keys[row], there[number == 1], earlier, pruned)
        return scores.masked_fill(window & slots.valid, scores.max().item() + 1)

    def _numbers(
        self, state: LayerState, row: int, there: Int[Tensor, " tokens"]
    ) -> Int[Tensor, " tokens"]:
        """Number of the image that each of a row's tokens belongs to, the last being 1; 0 for none."""
        if self.images is None:
            shown = state.tensors["shown"][row, there]
            begins = shown.clone()
            begins[1:] &= ~shown[:-1]
            number = begins.long().cumsum(dim=0)
            return torch.where(shown, number.max() + 1 - number, 0) if len(number) else number
        if self.images and self.images[-1][1] > len(there):
            raise UserError(
                f"images end at token {self.images[-1][1]}; row {row} holds {len(there)}"
            )
        number = torch.zeros_like(there)
        for place, (start, stop) in enumerate(reversed(self.images)):
            number[start:stop] = place + 1
        return number

    def _spatial(
        self,
        scores: Float[Tensor, "kv_heads slots"],
        last: Int[Tensor, " image"],
        norms: Float[Tensor, " slots"],
    ) -> None:
        """Add the spatial score to the last image's tokens, in every head."""
        if len(last) < 2:  # one token has no spread
            return
        norm = norms[last]
        standard = (norm - norm.mean()) / (norm.std() + 1e-8)
        scores[:, last] += self.alpha * (standard / self.temperature).softmax(dim=0)

    def _temporal(
        self,
        scores: Float[Tensor, "kv_heads slots"],
        keys: Float[Tensor, "kv_heads slots dim"],
        last: Int[Tensor, " image"],
        earlier: Int[Tensor, " earlier"],
        pruned: float,
    ) -> None:
        """Take the score of what the last image explains of the earlier ones, in each head."""
        count = int(pruned * len(earlier))
        if count < 1:
            return
        width = min(self.rank, len(last), keys.shape[-1])
        basis = torch.linalg.qr(keys[:, last[:width]].float().transpose(1, 2)).Q
        old = keys[:, earlier].float()
        residual = (old - old @ basis @ basis.transpose(1, 2)).norm(dim=-1)
        redundant = residual.argsort(dim=-1, stable=True)[:, :count]
        scores.scatter_(1, earlier[redundant], 0.0)


def _check_spans(images: Sequence[tuple[int, int]]) -> None:
    ordered = all(before[1] <= after[0] for before, after in pairwise(images))
    if not ordered or any(not 0 <= start < stop for start, stop in images):
        raise UserError(
            f"images takes spans (start, stop) in order that do not overlap, got {images}"
        )
