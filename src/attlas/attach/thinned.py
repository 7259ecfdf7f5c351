"""What parts that thin out the attention of a prompt have in common; decoding reads everything.

A subclass gives `pattern`, which pairs of a text may meet, or `attended`, its attention as a whole. Both
are given a `Text`: the valid tokens alone, counted from 0, so that no method meets padding. Rows of which
some tokens are padding are attended to one by one. Every call of several tokens is taken for a prompt or
a piece of one, unless its cache has been compressed; sliding-window layers and models that are not
causal stay as they are. Recorders are shown the weights of full attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from attlas import masks
from attlas.attach.call import Call
from attlas.attach.part import Selector
from attlas.catalog.kinds import SELECT, Kind
from attlas.masks import Mask
from attlas.masks.kept import kept_by_mask
from attlas.masks.pages import parted
from attlas.ops.delta import attend_with_sinks
from attlas.options import option
from attlas.positions.base import ScoreMod
from attlas.storage.layer import StoredLayer

#: Tokens of a side of the blocks by which the share of pairs that are read is told.
GRAIN = 32


@dataclass(frozen=True, slots=True)
class Text:
    """Queries of valid tokens and the keys up to the last of them.

    Attributes:
        layer: index of the layer.
        q: queries; the last stands at the last key.
        k: keys.
        v: values.
        scale: of the products.
        score_mod: change of scores in force, by these tokens' own numbers; None without.
        sinks: logits per head that take part in the softmax without a value, or None.
        seen: pairs that the model's own mask shows, where it hides more than later tokens.
    """

    layer: int
    q: Float[Tensor, "batch heads queries dim"]
    k: Float[Tensor, "batch kv_heads keys dim"]
    v: Float[Tensor, "batch kv_heads keys v_dim"]
    scale: float
    score_mod: ScoreMod | None = None
    sinks: Float[Tensor, " heads"] | None = None
    seen: Bool[Tensor, "batch _ queries keys"] | None = None

    @property
    def offset(self) -> int:
        """Tokens before the first query."""
        return self.k.shape[2] - self.q.shape[2]

    def attend(self, mask: Mask) -> Float[Tensor, "batch heads queries v_dim"]:
        """Attention under a pattern, within what the model shows."""
        within: Mask | Tensor = mask
        if self.seen is not None:
            sizes = self.q.shape[2], self.k.shape[2]
            within = masks.dense(mask, *sizes, device=self.q.device) & self.seen
        return attend_with_sinks(
            self.q, self.k, self.v, mask=within, score_mod=self.score_mod, scale=self.scale,
            sinks=self.sinks,
        )  # fmt: skip


class Thinned(Selector):
    """Base of the parts that let a prompt's tokens attend to fewer pairs."""

    kind: ClassVar[Kind] = SELECT
    #: A pattern chooses which pairs may meet.
    changes: ClassVar[tuple[str, ...]] = ("mask",)
    preset: ClassVar[str] = "prefill"
    #: Blocks of queries begin where the call does.
    whole_prompts: ClassVar[bool | None] = True

    dense_layers: tuple[int, ...] = option("layers that stay as they are", default=(), at_least=0)

    def setup(self) -> None:
        """Nothing has been read yet."""
        super().setup()
        #: Of each layer, the share of visible pairs that its last prompt read, a number a head.
        self.density: dict[int, Float[Tensor, " heads"]] = {}

    def pattern(self, text: Text) -> Mask:
        """Which pairs may meet: no query's later keys, whatever it says of them."""
        raise NotImplementedError

    def attended(self, text: Text) -> Float[Tensor, "batch heads queries v_dim"]:
        """Attention under the pattern."""
        mask = self.pattern(text) & masks.causal
        self.density[text.layer] = self.share(mask, text)
        return text.attend(mask)

    def share(self, mask: Mask, text: Text) -> Float[Tensor, " heads"]:
        """The share of the causal pairs that are read; a number a head."""
        return density_of(mask, text)

    def attend(self, call: Call) -> Float[Tensor, "batch query heads value_dim"] | None:
        """The thinned attention; None where there is no prompt to thin out."""
        if not is_prompt(call) or call.layer in self.dense_layers:
            return None
        return by_texts(call, lambda row, text: self.attended(text))


def by_texts(
    call: Call, attended: Callable[[int | None, Text], Tensor]
) -> Float[Tensor, "batch query heads value_dim"]:
    """What `attended` gives for the texts of a call, told the row of each, or None of one of all rows."""
    heads = call.q.new_zeros(*call.q.shape[:3], call.v.shape[3])
    for row, at, text in texts(call):
        if at is None:
            heads = attended(None, text)
        else:
            heads[row, :, at] = attended(row, text)[0].to(heads.dtype)
    return heads.transpose(1, 2).contiguous()


def texts(call: Call) -> Iterator[tuple[int, Tensor | None, Text]]:
    """(row, its valid queries, its text) of each row; one of all rows, and None, where none is padded."""
    # A static cache has room behind the last token.
    end = call.forward_pass.offset + call.q.shape[2]
    k, v, seen = call.k[:, :, :end], call.v[:, :, :end], call.mask
    seen = None if seen is None or only_causal(call) else seen[..., :end]
    valid = call.rows.of_keys(end)
    if valid is None or bool(valid.all()):
        yield 0, None, Text(call.layer, call.q, k, v, call.scaling, call.score_mod, call.sinks, seen)
        return
    first = call.forward_pass.offset
    for row in range(len(valid)):
        columns = valid[row].nonzero()[:, 0].to(k.device)
        at = columns[columns >= first] - first
        if not len(at):
            continue
        own = None if seen is None else seen[row if len(seen) > 1 else 0, :, at][:, :, columns][None]
        yield row, at, Text(
            call.layer, call.q[row, :, at][None], k[row, :, columns][None], v[row, :, columns][None],
            call.scaling, _of_row(call.score_mod, row, columns), call.sinks, own,
        )  # fmt: skip


def is_prompt(call: Call) -> bool:
    """Whether a call reads a prompt, or a piece of one, with full causal attention."""
    layer = call.cache_layer
    whole = call.original_positions is None and not (
        isinstance(layer, StoredLayer) and layer.compressed
    )
    slides = call.kwargs.get("sliding_window") is not None
    return call.q.shape[2] > 1 and call.is_causal and whole and not slides


def only_causal(call: Call) -> bool:
    """Whether the mask in force hides later tokens and padding and nothing else."""
    mask, shared = call.mask, call.forward_pass.shared
    if mask is None or mask is not call.model_mask:
        return mask is None
    if (key := ("only causal", id(mask))) not in shared:
        valid = call.rows.of_keys(call.k.shape[2])
        plain = masks.causal if valid is None else masks.causal & masks.padding(valid)
        sizes = call.q.shape[2], call.k.shape[2]
        seen = masks.dense(plain, *sizes, q_offset=call.forward_pass.offset, device=mask.device)
        shared[key] = torch.equal(seen.expand_as(mask), mask)
    found: bool = shared[key]
    return found


def density_of(mask: Mask, text: Text) -> Float[Tensor, " heads"]:
    """The share of the causal pairs that a pattern shows, by blocks; a number a head."""
    heads, queries, keys = text.q.shape[1], text.q.shape[2], text.k.shape[2]
    if (found := parted(mask)) is not None:
        blocks, (q_block, k_block) = found[0].held, found[0].size
        there = (blocks >= 0).sum(-1).float()
        last = text.offset + q_block * torch.arange(1, there.shape[2] + 1, device=there.device)
        every = -(-last.clamp(max=keys) // k_block)
        share = there.mean(0).sum(-1) / every.sum()
    else:
        share = _by_blocks(mask, queries, keys, text.q.device)
    return share.expand(heads)


@kept_by_mask(64)  # which a pattern has alike in every layer
def _by_blocks(
    mask: Mask, queries: int, keys: int, device: torch.device
) -> Float[Tensor, " heads"]:
    some, whole = (
        masks.grid(m, queries, keys, q_block=GRAIN, k_block=GRAIN, device=device)[0]
        for m in (mask, masks.causal)
    )
    share: Tensor = some.float().mean(0).sum((-1, -2)) / whole.sum()
    return share


def _of_row(mod: ScoreMod | None, row: int, columns: Tensor) -> ScoreMod | None:
    """A change of scores for one row, whose tokens are numbered without padding."""
    if mod is None:
        return None

    def moved(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mod(s, b + row, h, columns[q], columns[k])

    return moved
