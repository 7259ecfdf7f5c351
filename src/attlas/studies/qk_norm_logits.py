"""Scores of QK-norm after training at a high rate: cosines are bounded, dot products are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor

from attlas.catalog.registry import mechanism
from attlas.kinds.study import Beats, Row, Study
from attlas.options import option


@mechanism("qk-norm-logits", paper="qk-norm", example={"steps": 2, "dim": 16, "batch": 4})
class QKNormLogits(Study):
    """The same small decoder trained with and without QK-norm; the largest score before the softmax."""

    claim = "cosines bound the scores, so that training at high rates does not blow them up"
    expects = (Beats("qk-norm", "softmax"),)

    steps: int = option("of AdamW", default=400, at_least=1)
    rate: float = option("AdamW's learning rate", default=1e-2, above=0)
    batch: int = option("rows of a step", default=64, at_least=1)
    dim: int = option("width of the model", default=64, at_least=1)
    layers: int = option("of the model", default=2, at_least=1)
    heads: int = option("of each layer", default=4, at_least=1)

    @property
    def set_up(self) -> str:
        """What is measured, after what training."""
        return (
            f"largest |score| before the softmax, {self.steps} steps of `recall` at a rate of "
            f"{self.rate:.0e}, {self.layers} layers, dim {self.dim}".replace("e-0", "e-")
        )

    def run(self, seed: int) -> Iterator[Row]:
        """The largest score of each model on its last batch."""
        for name in ("softmax", "qk-norm"):
            yield Row(name, self._largest(name, seed), "", "lower")

    def _largest(self, name: str, seed: int) -> float:
        from attlas.models.decoder import Decoder, DecoderConfig
        from attlas.tasks.train import find

        torch.manual_seed(seed)
        task = find("recall")()
        config = DecoderConfig(
            vocab_size=task.sizes.outputs, hidden_size=self.dim, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, attention=name,
        )  # fmt: skip
        model, draw = Decoder(config).to(self.device), Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.rate)
        for _ in range(self.steps):
            drawn = task.draw(draw, self.batch)
            batch = {key: tensor.to(self.device) for key, tensor in drawn.items()}
            loss = task.loss(model(batch["input_ids"]).logits, batch) / task.terms(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seen: list[float] = []
        for block in model.model.layers:
            _watch(block.attention, seen)
        with torch.no_grad():
            model(batch["input_ids"])
        return max(seen)


def _watch(layer: Any, seen: list[float]) -> None:
    """Have a layer go through its stages, and note the largest score of each call."""
    score = layer.score

    def noting(q: Tensor, k: Tensor, inputs: Any) -> Tensor:
        scores: Tensor = score(q, k, inputs)
        seen.append(float(scores.abs().max()))
        return scores

    def by_stages(q: Tensor, k: Tensor, v: Tensor, inputs: Any) -> Any:
        return layer.aggregate(layer.weigh(q, k, inputs), v, inputs)

    layer.score, layer.attend = noting, by_stages
