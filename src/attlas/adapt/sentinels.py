"""Sentinel tokens: a special token ends every chunk of text and sums it up for all that comes later.

    visible(q, k) = k ≤ q  and  (q is no sentinel  or  k is in the chunk that q ends)

Chunks are ordinary tokens and the sentinel <SR> behind them. A sentinel reads its own chunk and itself;
ordinary tokens read all earlier tokens, sentinels among them. So a later token finds a chunk both token
by token and in one key. The sentinel has a row of its own in front of the model's embeddings, which
starts at their mean; it and every weight of the model are trained by the loss of ordinary tokens.

    adapter = attlas.make("sentinel-summary-tokens", chunk=32)
    with adapter.inject(model):
        ids = adapter.spread(tokenizer(text, return_tensors="pt").input_ids)   # <SR> after 32 tokens
        model(ids)

Cost: one token more a chunk. Reduces to the model itself on texts without sentinels.

What this rests on: the paper's abstract; no code was found. That a sentinel reads nothing but its chunk
is the catalogue's reading. Not known, and chosen here: the length of a chunk; that no token predicts a
sentinel, whose place is known; and that the first token of a chunk is predicted by the last ordinary
token before it, which has read everything, and not by the sentinel between them, which has not.
Source: "Taking a Deep Breath: Enhancing Language Modeling of Large Language Models with Sentinel Tokens".
"""

from __future__ import annotations

from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attlas import masks, mechanism
from attlas.errors import UserError
from attlas.hf.caches import Cache
from attlas.kinds.injection import Injection
from attlas.kinds.masked import Masked, Tokens
from attlas.masks import Mask
from attlas.options import option


def sentinels(marks: Bool[Tensor, "batch tokens"]) -> Mask:
    """Sentinels see their own chunk, other tokens all earlier ones; `marks` says which are sentinels."""
    chunk = marks.long().cumsum(-1) - marks.long()
    return masks.causal & (masks.document(chunk) | masks.padding(~marks).T)


@mechanism("sentinel-summary-tokens", paper="sentinel-summary-tokens", example={"chunk": 8})
class SentinelTokens(Masked):
    """Sentinel tokens: their embedding and their mask."""

    changes: ClassVar[tuple[str, ...]] = ("mask",)

    chunk: int = option("ordinary tokens before a sentinel in `spread` and in training", default=32,
                        at_least=1)  # fmt: skip

    def setup(self) -> None:
        """No cache is known."""
        super().setup()
        #: Of each cache, which of its tokens are sentinels.
        self._marks: WeakKeyDictionary[Cache, Tensor] = WeakKeyDictionary()

    def check(self, model: Any) -> None:
        """Refuse models whose embeddings are no plain table.

        Raises:
            ValueError: naming the family.
        """
        super().check(model)
        if type(model.get_input_embeddings()) is not nn.Embedding:
            raise UserError(
                f"{self.name} adds a row to a plain table of embeddings, and that of "
                f"{model.config.model_type} is a {type(model.get_input_embeddings()).__name__}"
            )

    def change(self, injection: Injection) -> None:
        """Put the sentinel's row before the embeddings, and listen to the calls of the model."""
        super().change(injection)
        table = injection.model.get_input_embeddings()
        path = next(name for name, module in injection.model.named_modules() if module is table)
        self.rows = Rows(table)
        injection.replace(path, self.rows)

    @property
    def token(self) -> int:
        """The id of the sentinel, the first behind the vocabulary.

        Raises:
            ValueError: the adapter is in no model.
        """
        self._injected("token")
        return self.rows.old.num_embeddings

    def spread(self, ids: Int[Tensor, "batch tokens"]) -> Int[Tensor, "batch more"]:
        """A text with a sentinel behind every `chunk` tokens; behind the last only if it is whole.

        Raises:
            ValueError: the adapter is in no model.
        """
        token, whole = self.token, ids.shape[1] // self.chunk * self.chunk
        chunks = ids[:, :whole].unflatten(1, (-1, self.chunk))
        ended = torch.cat([chunks, chunks.new_full((*chunks.shape[:2], 1), token)], dim=-1)
        return torch.cat([ended.flatten(1), ids[:, whole:]], dim=1)

    def pattern(self, tokens: Tokens) -> Mask | None:
        """The sentinels' mask where this call has sentinels.

        Raises:
            ValueError: a sentinel behind tokens of which it is not known where their last chunk ends.
        """
        if tokens.ids is None:
            return None
        own = tokens.ids == self.token
        before = own[:, :0] if tokens.cache is None else self._marks.get(tokens.cache, own[:, :0])
        before = before[:, : tokens.offset].to(own.device)
        known = before.shape == (len(own), tokens.offset)
        marks = torch.cat([before, own], dim=1) if known else own
        if tokens.cache is not None and known:
            self._marks[tokens.cache] = marks
        if not bool(own.any()):
            return None
        if not known:
            raise UserError(
                "a sentinel reads its own chunk, and where that begins in this cache is not known: its "
                "earlier tokens were read without the adapter, or its rows have changed; read them anew"
            )
        return sentinels(marks)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The sentinel's row and every weight of the model."""
        return dict(self._injected("trainable()").model.named_parameters())

    def loss(
        self, model: Any, ids: Int[Tensor, "batch tokens"], progress: float
    ) -> Float[Tensor, ""]:
        """Loss of the ordinary tokens, each predicted by the ordinary token before it."""
        spread = self.spread(ids)
        logits = model(input_ids=spread, use_cache=False).logits[spread != self.token]
        logits = logits.unflatten(0, ids.shape)[:, :-1]
        return cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


class Rows(nn.Module):
    """A table of embeddings and one row behind it."""

    def __init__(self, old: nn.Embedding) -> None:
        super().__init__()
        self.old = old
        self.row = nn.Parameter(old.weight.detach().mean(0))

    @property
    def weight(self) -> Tensor:
        """That of the table."""
        return self.old.weight

    def forward(self, ids: Int[Tensor, "*batch tokens"]) -> Float[Tensor, "*batch tokens dim"]:
        """Embeddings of ids up to the sentinel's."""
        own = ids == self.old.num_embeddings
        found: Tensor = self.old(ids.masked_fill(own, 0))
        return torch.where(own[..., None], self.row.to(found), found)
