"""Subject: the model that an analysis looks at, and what is given with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from attlas.errors import UserError

if TYPE_CHECKING:
    from attlas.inspect.prompts import Prompts

#: What an analysis may need, and how a user gives it.
GIVEN = {
    "text": "give token ids, Subject(model, input_ids=...), or --text on the command line",
    "prompts": "give pairs of prompts, Subject(model, prompts=...), or --task on the command line",
    "pictures": "give pictures, Subject(model, pixel_values=...)",
}


@dataclass(frozen=True)
class Subject:
    """A model and what it is given.

    Attributes:
        model: a Transformers model whose attention `attlas.attach` can watch, or one of attlas's own.
        input_ids: texts [rows, tokens].
        attention_mask: which of their tokens are no padding, [rows, tokens]; None where all are.
        pixel_values: pictures.
        labels: what the pictures or texts are labelled with, one for each row.
        prompts: pairs of prompts with their answers.
        tokenizer: of the model; what words need.
        seed: of what is drawn.
    """

    model: nn.Module
    input_ids: Int[Tensor, "rows tokens"] | None = None
    attention_mask: Int[Tensor, "rows tokens"] | Bool[Tensor, "rows tokens"] | None = None
    pixel_values: Float[Tensor, "rows channels height width"] | None = None
    labels: Tensor | None = None
    prompts: Prompts | None = None
    tokenizer: Any = field(default=None, repr=False)
    seed: int = 0

    @property
    def config(self) -> Any:
        """The configuration of the part of the model that attends."""
        config: Any = self.model.config
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    @property
    def layers(self) -> int:
        """How many layers it has."""
        return int(self.config.num_hidden_layers)

    @property
    def heads(self) -> int:
        """How many query heads a layer has."""
        return int(self.config.num_attention_heads)

    @property
    def device(self) -> torch.device:
        """Where the model's weights lie."""
        return next(self.model.parameters()).device

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """What the model is called with, on its device."""
        if self.pixel_values is not None:
            return {"pixel_values": self.pixel_values.to(self.device)}
        if self.input_ids is None:
            return {}
        given = {"input_ids": self.input_ids.to(self.device)}
        if self.attention_mask is not None:
            given["attention_mask"] = self.attention_mask.to(self.device)
        return given

    @property
    def valid(self) -> Bool[Tensor, "rows tokens"]:
        """Which tokens are no padding."""
        self.require("text", "this")
        assert self.input_ids is not None
        if self.attention_mask is None:
            return torch.ones_like(self.input_ids, dtype=torch.bool, device=self.device)
        return self.attention_mask.to(self.device).bool()

    def forward(self, **given: Any) -> Any:
        """What the model gives for these inputs."""
        return self.model(**self.inputs, **given)

    def rows(self, chosen: slice | Int[Tensor, " some"]) -> Subject:
        """The same model with some of the texts or pictures."""
        names = ("input_ids", "attention_mask", "pixel_values", "labels")
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        return replace(self, **{n: t[chosen] for n, t in given.items() if t is not None})

    def require(self, need: str, who: str) -> None:
        """See that something is there.

        Raises:
            ValueError: it is not; says how to give it.
        """
        there = {
            "weights": True,
            "text": self.input_ids is not None,
            "prompts": self.prompts is not None,
            "pictures": self.pixel_values is not None,
        }
        if not there[need]:
            raise UserError(f"{who} needs {need}: {GIVEN[need]}")
        if need == "text":
            assert self.input_ids is not None
            self._check_text(self.input_ids, who)

    def _check_text(self, ids: Tensor, who: str) -> None:
        """Refuse a text that is none, or longer than the model's positions."""
        if ids.ndim != 2 or not ids.shape[1]:
            raise UserError(
                f"{who} needs a text of at least one token, [rows, tokens]; got {list(ids.shape)}"
            )
        room = getattr(self.config, "max_position_embeddings", None)
        if room is not None and ids.shape[1] > room:
            raise UserError(
                f"the text has {ids.shape[1]} tokens, {type(self.model).__name__} has positions for "
                f"{room}; give a shorter one"
            )
