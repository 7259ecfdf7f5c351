"""Sinks of a masked-diffusion language model while it writes, beside those of an autoregressive twin.

    S_j = Σ_i mean_h A_hij              what token j receives in a layer; T of them sum to T
    j is a sink where S_j > mean_{k≠j} S_k + ε

Both models have the same blocks, bytes and begin token. The diffusion model sees both ways and learns
the bytes under masks of a random share t ~ U(0, 1); it writes by telling all masked bytes, keeping those
it is surest of, and telling the rest again. Sinks are found at every such step, and layer by layer.

    overlap = |first ∩ last| / |first ∪ last|      of the sinks at the first step and at the last
    rise    = loss with each layer's strongest sink hidden from all other tokens / loss − 1

ε = 3 is the threshold of which the paper is known to speak; that S is the sum over the queries and not
their mean, in which no column could be 3 above the others, is read out of it here.

Cost: two small trainings. Reduces to the plain models where no token is a sink.
Source: "Attention Sinks in Diffusion Language Models".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor
from torch.nn import functional as F

from attlas.attach.call import Call
from attlas.attach.part import Patch
from attlas.attach.session import attach
from attlas.catalog.registry import mechanism
from attlas.kinds.study import Beats, Row, Study, Within
from attlas.options import option
from attlas.parts.record.column_sums import ColumnSums

#: Behind the 256 bytes: the token that every text begins with, and the one that stands for a hidden byte.
BEGIN, MASK = 256, 257
#: Share of a text that is given when both go on with it.
GIVEN = 0.25
#: Share of the bytes under masks where the diffusion model's loss is measured.
HIDDEN = 0.5


def sinks_of(
    received: Float[Tensor, "*rows tokens"], epsilon: float
) -> Bool[Tensor, "*rows tokens"]:
    """Which tokens receive more than the others do on average, by more than `epsilon`."""
    others = (received.sum(-1, keepdim=True) - received) / max(1, received.shape[-1] - 1)
    return received > others + epsilon


class HideTokens(Patch):
    """Each layer's chosen tokens are hidden from all others; a token always sees itself."""

    nothing = None
    whole_prompts = True

    def hide(self, chosen: Bool[Tensor, "layers batch tokens"]) -> HideTokens:
        """The part, with the tokens that it hides."""
        self.chosen = chosen
        return self

    def mask(self, call: Call) -> Bool[Tensor, "batch 1 query keys"]:
        """True where a query may see a key."""
        hidden = self.chosen[call.layer].to(call.q.device)
        own = torch.eye(hidden.shape[-1], dtype=torch.bool, device=call.q.device)
        return (~hidden[:, None] | own)[:, None]


@mechanism(
    "diffusion-lm-sinks", paper="diffusion-lm-sinks",
    example={"steps": 2, "batch": 2, "length": 12, "dim": 8, "layers": 2, "heads": 2, "rounds": 3,
             "texts": 2},
)  # fmt: skip
class DiffusionLMSinks(Study):
    """A masked-diffusion language model and its autoregressive twin: where their sinks are, and go."""

    claim = (
        "the sinks of a diffusion language model move while it writes, those of its autoregressive twin "
        "stay at the first token, and the twin is hurt more where one is hidden"
    )
    expects = (
        Within("overlap of first and last step", most=0.5),
        Within("twin's sinks at the first token", least=90.0),
        Beats("rise, diffusion", "rise, twin"),
    )

    steps: int = option("of AdamW", default=1000, at_least=1)
    rate: float = option("highest learning rate", default=2e-3, above=0)
    batch: int = option("rows of a step", default=32, at_least=1)
    length: int = option("bytes of a text", default=64, at_least=4)
    dim: int = option("width of the models", default=96, at_least=1)
    layers: int = option("of a model", default=4, at_least=1)
    heads: int = option("of each layer", default=4, at_least=1)
    rounds: int = option("steps in which the diffusion model writes", default=16, at_least=2)
    texts: int = option("held-out texts that are gone on with and scored", default=32, at_least=1)
    epsilon: float = option("by how much a sink exceeds the mean of the others", default=3.0, above=0)
    begin: bool = option("every text begins with a token of its own", default=True)

    @property
    def set_up(self) -> str:
        """What is trained, and what is measured."""
        return (
            f"bytes of Shakespeare, {self.length} a text, {self.steps} steps, {self.layers} layers, dim "
            f"{self.dim}; sinks over {self.rounds} steps of {self.texts} texts, ε = {self.epsilon:g}"
        )

    def run(self, seed: int) -> Iterator[Row]:
        """Train both, let both write, and hide their sinks."""
        from attlas.tasks.train.shakespeare_bytes import text_bytes, windows

        draw = Generator().manual_seed(seed)

        def bytes_of(rows: int, split: str = "train") -> Tensor:
            text = windows(draw, text_bytes(), rows, self.length, split)
            first = torch.full((rows, int(self.begin)), BEGIN)
            return torch.cat([first, text], dim=1).to(self.device)

        texts = bytes_of(self.texts, "test")
        diffusion, twin = self._trained(bytes_of, draw)
        with torch.no_grad():
            steps = self._written(diffusion, texts, draw)
            yield Row("overlap of first and last step", overlap(steps[0], steps[-1]), "", "lower")
            for n in range(1, len(steps)):
                yield Row("overlap with the first step", overlap(steps[0], steps[n]), "", "lower", n)
            count = mean(float(step.sum(-1).float().mean()) for step in steps)
            yield Row("diffusion's sinks", count, "a layer")
            yield from self._twins_sinks(twin, texts, draw)
            yield from self._hidden(diffusion, twin, texts, draw)

    def _trained(self, bytes_of: Callable[[int], Tensor], draw: Generator) -> tuple[Any, Any]:
        """The diffusion model and its twin."""
        from attlas.models.decoder import Decoder, DecoderConfig
        from attlas.models.encoder import EncoderConfig, EncoderForMaskedLM
        from attlas.train.small import fit

        sizes: dict[str, Any] = {
            "vocab_size": MASK + 1, "hidden_size": self.dim, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
        }  # fmt: skip
        diffusion = EncoderForMaskedLM(EncoderConfig(**sizes)).to(self.device)
        twin = Decoder(DecoderConfig(**sizes)).to(self.device)

        def denoising() -> Tensor:
            texts = bytes_of(self.batch)
            share = torch.rand(len(texts), 1, generator=draw)
            return masked_loss(diffusion, texts, self._under(texts, share, draw))

        fit(diffusion, denoising, self.steps, self.rate)
        fit(twin, lambda: next_loss(twin, bytes_of(self.batch)), self.steps, self.rate)
        return diffusion, twin

    def _under(
        self, texts: Tensor, share: Tensor | float, draw: Generator
    ) -> Bool[Tensor, "rows tokens"]:
        """Which bytes stand under masks: at least one of each row, never the begin token."""
        chance = torch.rand(texts.shape, generator=draw)
        chance[:, : int(self.begin)] = 2.0
        return ((chance < share) | (chance == chance.amin(1, keepdim=True))).to(texts.device)

    def _written(self, model: Any, texts: Int[Tensor, "rows tokens"], draw: Generator) -> list[Tensor]:
        """The sinks at each step in which the model goes on with texts, [layers, rows, tokens] each."""
        tokens, given = texts.clone(), int(self.begin) + int(GIVEN * self.length)
        tokens[:, given:] = MASK
        found = []
        for left in range(self.rounds, 0, -1):
            logits, received = watched(model, tokens)
            found.append(sinks_of(received, self.epsilon))
            chances = logits[..., :BEGIN].softmax(-1).cpu()
            told = torch.multinomial(chances.flatten(0, 1), 1, generator=draw).view(tokens.shape)
            sure = chances.gather(-1, told[..., None])[..., 0].to(tokens.device)
            sure = sure.masked_fill(tokens != MASK, -1.0)
            count = -(-int((tokens[0] == MASK).sum()) // left)
            kept = torch.zeros_like(sure, dtype=torch.bool).scatter(1, sure.topk(count).indices, True)
            tokens = torch.where(kept & (tokens == MASK), told.to(tokens.device), tokens)
        return found

    def _twins_sinks(self, model: Any, texts: Tensor, draw: Generator) -> Iterator[Row]:
        """The twin goes on with the same texts; its sinks when half is written and at the end."""
        tokens = texts[:, : int(self.begin) + int(GIVEN * self.length)]
        found, half = [], texts.shape[1] // 2
        while tokens.shape[1] < texts.shape[1]:
            logits, received = watched(model, tokens)
            if tokens.shape[1] == half:
                found.append(sinks_of(received, self.epsilon))
            chances = logits[:, -1, :BEGIN].softmax(-1).cpu()
            told = torch.multinomial(chances, 1, generator=draw).to(tokens.device)
            tokens = torch.cat([tokens, told], dim=1)
        found.append(sinks_of(watched(model, tokens)[1], self.epsilon))
        first, last = F.pad(found[0], (0, tokens.shape[1] - found[0].shape[-1])), found[-1]
        yield Row("overlap of half and whole, twin", overlap(first, last))
        some = last.any(-1)
        there = last[..., 0] & (last.sum(-1) == 1)
        share = float(there[some].float().mean()) if some.any() else 0.0
        yield Row("twin's sinks at the first token", 100 * share, "%")
        yield Row("twin's layers with a sink", 100 * float(some.float().mean()), "%")

    def _hidden(self, diffusion: Any, twin: Any, texts: Tensor, draw: Generator) -> Iterator[Row]:
        """Both models' losses, and how much they rise where each layer's strongest sink is hidden."""
        under = self._under(texts, HIDDEN, draw)
        losses: dict[str, Callable[[], Tensor]] = {
            "diffusion": lambda: masked_loss(diffusion, texts, under),
            "twin": lambda: next_loss(twin, texts),
        }
        for name, model, seen in (
            ("diffusion", diffusion, texts.masked_fill(under, MASK)), ("twin", twin, texts),
        ):  # fmt: skip
            loss = losses[name]
            received = watched(model, seen)[1]
            strongest = F.one_hot(received.argmax(-1), received.shape[-1]).bool()
            plain = loss()
            with attach(model, HideTokens().hide(strongest & sinks_of(received, self.epsilon))):
                changed = loss()
            yield Row(f"loss, {name}", float(plain), "nats", "lower")
            yield Row(f"rise, {name}", 100 * float(changed / plain - 1), "%", "lower")


def watched(
    model: Any, tokens: Int[Tensor, "rows tokens"]
) -> tuple[Float[Tensor, "rows tokens vocabulary"], Float[Tensor, "layers rows tokens"]]:
    """Logits, and what each token receives in each layer, heads averaged."""
    recorder = ColumnSums()
    with attach(model, record=[recorder]):
        logits = model(tokens).logits
    return logits, recorder.result().mean(dim=2)


def overlap(first: Bool[Tensor, "layers rows tokens"], last: Bool[Tensor, "layers rows tokens"]) -> float:
    """Mean share of common sinks, over the layers and rows that have any; 1 where none has."""
    either, both = (first | last).sum(-1), (first & last).sum(-1)
    some = either > 0
    return float((both[some] / either[some]).mean()) if some.any() else 1.0


def masked_loss(
    model: Any, texts: Int[Tensor, "rows tokens"], under: Bool[Tensor, "rows tokens"]
) -> Float[Tensor, ""]:
    """Cross-entropy of the bytes under masks."""
    return F.cross_entropy(model(texts.masked_fill(under, MASK)).logits[under], texts[under])


def next_loss(model: Any, texts: Int[Tensor, "rows tokens"]) -> Float[Tensor, ""]:
    """Cross-entropy of each next byte."""
    return F.cross_entropy(model(texts).logits[:, :-1].flatten(0, 1), texts[:, 1:].flatten())
