"""ChunkLLM: a frozen model reads the chunks that small trained parts choose, anew at every chunk's end.

    token t ends a chunk      σ(w·h_t + b) > α,  h the output of the first layer
    s(t, c) = Q(x_t)·K(x_{e_c}) / √r             e_c the last token of chunk c, x what the layer's
                                                 attention is given, Q and K small networks of width r
    query t reads             its own chunk, and of the chunks before it the `keep` with the largest
                              s(b, c), where b ≤ t is the last token that ended a chunk

So between two ends of chunks all tokens read the same ones: chunks are chosen when an end is met, not at
every token. The first layer, of whose output ends are told, reads everything. Q and K of a layer are
trained to tell the model's own attention of each token to the chunks before, heads averaged and the
tokens of a chunk summed: KL(attention over chunks ‖ softmax_c s(t, c)). Ends are trained by binary
cross-entropy to fall where a sentence ends. Every weight of the model is frozen.

    adapter = attlas.make("chunkllm", ends=[ids of tokens that end sentences], keep=16)
    with adapter.inject(model):
        model.generate(ids)

Cost: r numbers a token and layer beside the cache, and (chunks)² products of width r. Masks are dense
here, so that nothing is faster by it. Reduces to the model itself where `keep` reaches the chunks.

What this rests on: abstract and summaries of the paper; no code was found. The classifier and its place,
Q and K beside the layer's own projections, distillation, and the choice at ends alone are the paper's.
Not known, and chosen here: the form of Q and K (two linear maps, SiLU between), that they serve all heads
of a layer, that a chunk is scored by its last token, the loss's average over heads and tokens, that each
layer chooses for itself, that a prompt is read as it would be decoded, α, r, and that sentences end at
the tokens in `ends`, where the paper labels its texts by pySBD.
Source: "ChunkLLM: A Lightweight Pluggable Framework for Accelerating LLMs Inference".
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from attlas import mechanism
from attlas.attach import attach
from attlas.attach.towers import is_attention
from attlas.errors import UserError
from attlas.hf.sources import layers_of
from attlas.kinds.beside import longer, recalled, remember
from attlas.kinds.injection import Injection
from attlas.kinds.masked import Masked, Shown, Tokens
from attlas.masks import Mask
from attlas.options import option


@mechanism("chunkllm", paper="chunkllm", example={"ends": [5, 9, 13, 21, 30, 41], "keep": 2, "width": 8})
class ChunkLLM(Masked):
    """A classifier of chunks' ends, and what chooses among chunks in every layer but the first."""

    changes: ClassVar[tuple[str, ...]] = ("mask",)
    nothing: ClassVar[dict[str, Any]] = {"keep": 10**6}

    keep: int = option("chunks before its own that a token reads", default=64, at_least=1)
    width: int = option("r, of what scores chunks", default=128, at_least=1)
    threshold: float = option(
        "α, probability above which a token ends a chunk", default=0.5, above=0, below=1
    )
    ends: list[int] = option(
        "ids of the tokens that end sentences, for training", factory=lambda _: [], at_least=0
    )

    def setup(self) -> None:
        """Nothing is read."""
        super().setup()
        self._seen: dict[str, Tensor] = {}
        #: What training looks at, while the model reads everything: states by layer, ends' at −1.
        self._looked: dict[int, Tensor] | None = None

    def change(self, injection: Injection) -> None:
        """Put the parts into the model, and listen to its calls and to its first layer."""
        super().change(injection)
        model = injection.model
        names = {id(module): name for name, module in model.named_modules()}
        first = next(m for m in layers_of(model)[0] if is_attention(m))
        block = model.get_submodule(names[id(first)].rpartition(".")[0])
        config = model.config.get_text_config(decoder=True)
        parts = Parts(config.hidden_size, self.width, config.num_hidden_layers)
        self.parts = parts.to(next(block.parameters()))
        injection.add("chunkllm", self.parts)
        injection.hook(block.register_forward_hook(self._told))

    def trainable(self) -> dict[str, nn.Parameter]:
        """Those of the parts."""
        return dict(self.parts.named_parameters())

    def pattern(self, tokens: Tokens) -> Mask | None:
        """Nothing that all layers hide; what was remembered is called back.

        Raises:
            ValueError: a cache whose tokens were read without the adapter.
        """
        self._seen = recalled(tokens.cache) if tokens.offset else {}
        marks = self._seen.get("marks")
        if tokens.offset and (marks is None or marks.shape != (tokens.batch, tokens.offset)):
            raise UserError(
                "where the chunks of this cache end is not known: its earlier tokens were read without "
                "the adapter, or its rows have changed; read them anew"
            )
        return None

    def _told(self, block: nn.Module, args: Any, output: Any) -> None:
        """Ends of chunks, from the output of the first layer."""
        hidden = output[0] if isinstance(output, tuple) else output
        if self._looked is not None:
            self._looked[-1] = hidden
        elif self._now is not None:
            tokens = self._now.tokens
            marks = self.parts.ends(hidden)[..., 0].float().sigmoid() > self.threshold
            if tokens.valid is not None:
                marks = marks & tokens.valid[:, tokens.offset :].to(marks.device)
            self._seen["marks"] = longer(self._seen.get("marks"), marks)

    def pattern_of(
        self, layer: int, hidden: Float[Tensor, "batch length dim"], tokens: Tokens
    ) -> Mask | None:
        """The token's own chunk and those that were chosen."""
        if self._looked is not None:
            self._looked[layer] = hidden
            return None
        if layer == 0:
            return None
        q, k = self.parts(layer, hidden)
        keys = longer(self._seen.get(f"keys{layer}"), k)
        seen, chosen = chunks_read(
            q, keys, self._seen["marks"], self.keep, self._seen.get(f"chosen{layer}")
        )
        self._seen |= {f"keys{layer}": keys, f"chosen{layer}": chosen}
        return Shown(seen[:, None], tokens.offset)

    def _end(self, base: nn.Module, args: Any, output: Any) -> None:
        if output is not None and self._now is not None and self._now.tokens.cache is not None:
            remember(self._now.tokens.cache, {n: x.detach() for n, x in self._seen.items()})
        self._seen = {}
        super()._end(base, args, output)

    def labels(self, ids: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """Where sentences end.

        Raises:
            ValueError: no `ends` were given.
        """
        if not self.ends:
            raise UserError(
                f"ends: {self.name} learns where chunks end from tokens that end sentences; give their "
                "ids"
            )
        return torch.isin(ids, torch.tensor(self.ends, device=ids.device))

    def loss(
        self, model: Any, ids: Int[Tensor, "batch tokens"], progress: float
    ) -> Float[Tensor, ""]:
        """Distillation of attention to chunks, averaged over layers, and cross-entropy of ends."""
        marks, (states, weights) = self.labels(ids), self.taught(model, ids)
        told = self.parts.ends(states[-1])[..., 0].float()
        found = binary_cross_entropy_with_logits(told, marks.float())
        layers = range(1, len(weights))
        for layer in layers:
            q, k = self.parts(layer, states[layer])
            scores = chunk_scores(q, k, marks)
            found = found + divergence(of_chunks(weights[layer], marks), scores, marks) / len(layers)
        return found

    def recall(self, model: Any, ids: Int[Tensor, "batch tokens"]) -> float:
        """Share of the `keep` chunks that the model attends to most which Q and K choose, where more have
        ended; a mean over ends and layers.

        Raises:
            ValueError: no text in which so many end.
        """
        marks, (states, weights) = self.labels(ids), self.taught(model, ids)
        count, found = marks.long().cumsum(-1), []
        asked = marks & (count > self.keep)
        if not asked.any():
            raise UserError(f"ids: more than keep={self.keep} chunks must end in a text")
        later = torch.arange(int(count.max()), device=ids.device) >= count[asked][:, None]
        for layer in range(1, len(weights)):
            with torch.no_grad():
                q, k = self.parts(layer, states[layer])
                scores = chunk_scores(q, k, marks)
            both = (x[asked].float().masked_fill(later, -torch.inf)
                    for x in (scores, of_chunks(weights[layer], marks)))  # fmt: skip
            ours, theirs = (x.topk(self.keep).indices for x in both)
            found.append((ours[..., None] == theirs[:, None]).any(-1).float().mean())
        return float(torch.stack(found).mean())

    def taught(
        self, model: Any, ids: Int[Tensor, "batch tokens"]
    ) -> tuple[dict[int, Tensor], Float[Tensor, "layers batch tokens tokens"]]:
        """(what each layer's attention is given, the first layer's output at −1; attention, heads
        averaged) of the model itself, which reads everything."""
        self._looked = {}
        try:
            with torch.no_grad(), attach(model, record=["weights"]) as session:
                model(input_ids=ids, use_cache=False)
                return self._looked, session["weights"].mean(2).to(ids.device)
        finally:
            self._looked = None


class Parts(nn.Module):
    """What is trained: the classifier of ends, and Q and K of every layer but the first."""

    def __init__(self, dim: int, width: int, layers: int) -> None:
        super().__init__()
        self.ends = nn.Linear(dim, 1)
        self.queries = nn.ModuleList(_two(dim, width) for _ in range(layers - 1))
        self.keys = nn.ModuleList(_two(dim, width) for _ in range(layers - 1))

    def forward(
        self, layer: int, x: Float[Tensor, "batch tokens dim"]
    ) -> tuple[Float[Tensor, "batch tokens width"], Float[Tensor, "batch tokens width"]]:
        """(Q, K) of a layer, Q with the scale of the product."""
        q: Tensor = self.queries[layer - 1](x)
        return q * q.shape[-1] ** -0.5, self.keys[layer - 1](x)


def _two(dim: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width))


def places(marks: Bool[Tensor, "batch tokens"]) -> Int[Tensor, "batch most"]:
    """Columns of a row's ends, in their order; behind them any, in rows that have fewer."""
    most = int(marks.sum(-1).max())
    return (~marks).byte().sort(dim=-1, stable=True).indices[:, :most]


def chunk_scores(
    q: Float[Tensor, "batch queries width"], keys: Float[Tensor, "batch columns width"],
    marks: Bool[Tensor, "batch columns"],
) -> Float[Tensor, "batch queries most"]:  # fmt: skip
    """s of every chunk that has ended, by its last token."""
    at = places(marks)[..., None].expand(-1, -1, keys.shape[-1])
    return q @ keys.gather(1, at).mT


def chunks_read(
    q: Float[Tensor, "batch queries width"], keys: Float[Tensor, "batch columns width"],
    marks: Bool[Tensor, "batch columns"], keep: int, before: Bool[Tensor, "batch earlier"] | None,
) -> tuple[Bool[Tensor, "batch queries columns"], Bool[Tensor, "batch columns"]]:  # fmt: skip
    """(which columns the last queries read, of those before them; what the last end chose).

    Args:
        q: of the queries.
        keys: of all columns.
        marks: which columns end a chunk.
        keep: chunks that are chosen.
        before: columns that the last end before these queries chose.
    """
    columns, first = marks.shape[1], marks.shape[1] - q.shape[1]
    ended = marks.long().cumsum(-1)
    chunk = ended - marks.long()
    earlier = ended[:, first - 1] if first else torch.zeros_like(ended[:, 0])
    at = places(marks[:, first:])
    scores = chunk_scores(q.gather(1, at[..., None].expand(-1, -1, q.shape[-1])), keys, marks)
    order = earlier[:, None] + torch.arange(at.shape[1], device=q.device)  # which end this is
    later = torch.arange(scores.shape[-1], device=q.device) > order[..., None]
    scores = scores.masked_fill(later, -torch.inf)
    best = scores.topk(min(keep, scores.shape[-1]), dim=-1).indices
    chosen = torch.zeros_like(later).scatter(-1, best, True) & ~later
    # Chunks as columns; those that have not ended have no score.
    inside = chunk.clamp(max=max(0, scores.shape[-1] - 1))[:, None].expand(-1, at.shape[1], -1)
    has = (chunk < ended[:, -1:])[:, None]
    each = chosen.gather(-1, inside) & has if at.shape[1] else chosen.new_zeros(len(q), 0, columns)
    held = torch.zeros_like(marks)
    if before is not None:
        held[:, :first] = before.to(held.device)
    table = torch.cat((held[:, None], each), dim=1)
    row = ended[:, first:] - earlier[:, None]
    read = table.gather(1, row[..., None].expand(-1, -1, columns))
    own = chunk[:, first:, None] == chunk[:, None]
    return read | own, table.gather(1, row[:, -1:, None].expand(-1, -1, columns))[:, 0]


def of_chunks(
    weights: Float[Tensor, "batch tokens tokens"], marks: Bool[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens most"]:
    """Weights summed over the tokens of each chunk that has an end."""
    chunk = marks.long().cumsum(-1) - marks.long()
    most = int(marks.sum(-1).max())
    return weights @ (chunk[..., None] == torch.arange(most, device=marks.device)).to(weights)


def divergence(
    weights: Float[Tensor, "batch tokens most"], scores: Float[Tensor, "batch tokens most"],
    marks: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, ""]:  # fmt: skip
    """KL(attention ‖ softmax of scores) over the chunks that have ended, a mean over the tokens for which
    more than one has; both before the last mark alone."""
    count = marks.long().cumsum(-1)[..., None]
    there = torch.arange(scores.shape[-1], device=scores.device) < count
    target = weights.float().masked_fill(~there, 0.0)
    target = target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    told = scores.float().masked_fill(~there, -torch.inf).masked_fill(count == 0, 0.0).log_softmax(-1)
    each = (torch.xlogy(target, target) - target * told.masked_fill(~there, 0.0)).sum(-1)
    asked = (count[..., 0] > 1).to(each)
    return (each * asked).sum() / asked.sum().clamp(min=1.0)
