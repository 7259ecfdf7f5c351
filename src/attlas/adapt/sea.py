"""SEA: a linear-cost estimate of each query's attention, K columns wide, says which keys it reads.

    c_t    = Σ_s φ(q_t)·φ(k_s) [p_s, v_s] / Σ_s φ(q_t)·φ(k_s)    random features, over s ≤ t; p is learnt
    z_t    = GELU(norm(W [c_t, v_t]))                            shared by the heads of a layer
    Â_t    = softmax(decoder(z)_t)                               K numbers a head, by convolutions over
                                                                 this row and earlier ones
    mask_t = the max(1, round(H keep K / n)) largest of the H K numbers of Â_t, all heads together, column
             c of them stretched to the keys ⌊c n/K⌉ … ⌊(c+1) n/K⌉ − 1 of the n = t + 1 so far
    y_t    = σ(a_t) σ(b_t) Σ_j softmax_{j in mask}(q_t·k_j/√d) v_j + (1 − σ(b_t)) mean_{j ≤ t} v_j

with a, b linear in z. So a head reads `keep` keys on average, some heads more and some fewer. The model
is frozen and is the teacher: the estimate, stretched to all keys, learns its attention (0.1 KL + squared
error), and a, b its heads' outputs (squared error), layer by layer.

    adapter = attlas.make("sea-attention", keep=32)
    with adapter.inject(model):
        model.generate(ids)

Cost: linear in n for the estimate, and n · keep · H pairs; the mask is made densely here and attention
hides pairs by it, so that nothing is faster. What is remembered beside a cache does not grow. Reduces to
the model itself at `mix=False` where `keep` reaches the keys.

Features are max(x Pᵀ / d^¼, 0) + 0.001 as in the authors' program, which has all of the above. Its last
convolution pads columns and shrinks them again, which is not repeated. Chosen here: the estimate sees
queries and keys before they are rotated; a query's own key is always read, so that no row is empty; P is
drawn once, by a layer's number; the model's own weights get no low-rank changes; every layer is trained
by itself.
Source: "SEA: Sparse Linear Attention with Estimated Attention Mask".
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import gelu, mse_loss, pad

from attlas import mechanism, ops
from attlas.attach import attach
from attlas.attach.towers import is_attention
from attlas.errors import UserError
from attlas.hf.sources import layers_of
from attlas.kinds.beside import recalled, remember
from attlas.kinds.injection import Injection
from attlas.kinds.masked import Masked, Shown, Tokens
from attlas.masks import Mask
from attlas.options import option

#: Columns that the decoder's first rows have for one of K, and channels of a head in it.
DOWN, CHANNELS = 4, 2
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
#: Rows before its own that a convolution of the decoder sees.
REACH = 4
#: What an estimator remembers of the tokens so far.
NAMES = ("state", "before", "between", "sum")


@mechanism("sea-attention", paper="sea-attention", aliases=("sea",), example={"keep": 4, "columns": 8})
class SEA(Masked):
    """An estimate of attention beside every layer, and attention to the keys that it names."""

    changes: ClassVar[tuple[str, ...]] = ("mask", "aggregate")
    nothing: ClassVar[dict[str, Any]] = {"keep": 10**6, "mix": False}

    keep: int = option("keys that a head reads, on average", default=64, at_least=1)
    columns: int = option("K, width of the estimate, a multiple of 4", default=256, at_least=4)
    mix: bool = option(
        "whether outputs are scaled, and blended with the mean of the values", default=True
    )

    def setup(self) -> None:
        """Nothing is read.

        Raises:
            ValueError: columns that are no multiple of 4.
        """
        super().setup()
        if self.columns % DOWN:
            raise UserError(f"columns must be a multiple of {DOWN}, got {self.columns}")
        self._seen: dict[str, Tensor] = {}
        #: Of each layer of the call under way, what its heads are blended with.
        self._blends: dict[int, tuple[Tensor, Tensor]] = {}
        #: What training looks at, while the model reads everything.
        self._looked: dict[int, Tensor] | None = None

    def check(self, model: Any) -> None:
        """Refuse models whose attention has not the four projections.

        Raises:
            ValueError: naming the family.
        """
        super().check(model)
        for module in _modules(model).values():
            if not all(isinstance(getattr(module, name, None), nn.Linear) for name in PROJECTIONS):
                raise UserError(
                    f"{self.name} takes models whose attention has {', '.join(PROJECTIONS)}, and that of "
                    f"{model.config.model_type} has not"
                )

    def change(self, injection: Injection) -> None:
        """Put an estimator for each layer into the model, and listen to its attention."""
        super().change(injection)
        config = injection.model.config.get_text_config(decoder=True)
        self.layers: Any = nn.ModuleList()  # estimators, whose type it does not tell
        for layer, module in sorted(_modules(injection.model).items()):
            sizes = config.num_attention_heads, module.head_dim, self.columns
            made = Estimator(*sizes, config.max_position_embeddings, features(module.head_dim, layer))
            self.layers.append(made.to(module.q_proj.weight))
            injection.hook(module.o_proj.register_forward_pre_hook(partial(self._blend, layer)))
        injection.add("sea_attention", self.layers)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Those of the estimators."""
        return dict(self.layers.named_parameters())

    def pattern(self, tokens: Tokens) -> Mask | None:
        """Nothing that all layers hide; what was remembered is called back.

        Raises:
            ValueError: a cache whose tokens were read without the adapter, or too long a text.
        """
        self._seen = recalled(tokens.cache) if tokens.offset else {}
        if tokens.offset and "state0" not in self._seen:
            raise UserError(
                "what the estimate knows of this cache's tokens is not there: they were read without the "
                "adapter; read them anew"
            )
        most = self.layers[0].places.shape[0]
        if tokens.seen > most:
            raise UserError(f"{self.name} has places for {most} tokens, got {tokens.seen}")
        return None

    def pattern_of(
        self, layer: int, hidden: Float[Tensor, "batch length dim"], tokens: Tokens
    ) -> Mask | None:
        """The keys that the estimate names."""
        if self._looked is not None:
            self._looked[layer] = hidden
            return None
        q, k, v = self.projected(layer, hidden)
        ranks = tokens.ranks.to(q.device).expand(len(q), -1)
        valid = None if tokens.valid is None else tokens.valid[:, tokens.offset :].to(q.device)
        own = {name: self._seen.get(f"{name}{layer}") for name in NAMES}
        found = self.layers[layer](q, k, v, ranks[:, tokens.offset :], valid, own)
        self._seen |= {f"{name}{layer}": x for name, x in own.items() if x is not None}
        if self.mix:
            self._blends[layer] = found[1:]
        return Shown(keys_read(found[0], ranks[:, tokens.offset :], ranks, self.keep), tokens.offset)

    def projected(self, layer: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a layer, not rotated, as many heads of each."""
        module = _modules(self._injected("projected").model)[layer]
        heads = self.layers[layer].heads
        three = (getattr(module, name)(hidden) for name in PROJECTIONS[:3])
        q, k, v = (x.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for x in three)
        return q, ops.repeated(k, heads), ops.repeated(v, heads)

    def _blend(self, layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> Any:
        """What a layer's heads read, scaled and blended, before it is projected."""
        if layer not in self._blends:
            return None
        scales, mean = self._blends.pop(layer)
        heads = args[0].unflatten(-1, (mean.shape[1], -1)).transpose(1, 2)
        return (blend(heads, scales, mean).transpose(1, 2).flatten(2).to(args[0].dtype), *args[1:])

    def _end(self, base: nn.Module, args: Any, output: Any) -> None:
        if output is not None and self._now is not None and self._now.tokens.cache is not None:
            remember(self._now.tokens.cache, {n: x.detach() for n, x in self._seen.items()})
        self._seen, self._blends = {}, {}
        super()._end(base, args, output)

    def loss(
        self, model: Any, ids: Int[Tensor, "batch tokens"], progress: float
    ) -> Float[Tensor, ""]:
        """How far estimates and outputs are from the model's own, a mean over layers."""
        self._looked = {}
        try:
            with torch.no_grad(), attach(model, record=["weights"]) as session:
                model(input_ids=ids, use_cache=False)
                weights, states = session["weights"].to(ids.device), self._looked
        finally:
            self._looked = None
        ranks = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        each = []
        for layer in range(len(weights)):
            with torch.no_grad():
                q, k, v = self.projected(layer, states[layer])
            own: dict[str, Tensor | None] = dict.fromkeys(NAMES)
            scores, scales, mean = self.layers[layer](q, k, v, ranks, None, own)
            each.append(self._distance(weights[layer].float(), scores, scales, mean, v, ranks))
        return torch.stack(each).mean()

    def _distance(
        self, weights: Tensor, scores: Tensor, scales: Tensor, mean: Tensor, v: Tensor, ranks: Tensor
    ) -> Tensor:
        """From a layer's attention of what was estimated, and from its outputs of ours."""
        later = ranks[:, None, None] > ranks[:, None, :, None]
        at = column_of(ranks + 1, ranks, scores.shape[-1])[:, None].expand_as(weights)
        told = scores.float().gather(-1, at).masked_fill(later, -torch.inf).log_softmax(-1)
        kl = torch.xlogy(weights, weights) - weights * told.masked_fill(later, 0.0)
        found = 0.1 * kl.sum(-1).mean() + mse_loss(told.exp(), weights)
        if not self.mix:
            return found
        kept, v = weights * keys_read(scores, ranks, ranks, self.keep), v.float()
        sparse = ops.divided(kept, kept.sum(-1, keepdim=True)) @ v
        ours = blend(sparse, scales.float(), mean.float())
        return found + mse_loss(ours, weights @ v)


class Estimator(nn.Module):
    """A layer's estimate: random features, an encoder of each head and token, a causal decoder."""

    def __init__(self, heads: int, dim: int, columns: int, most: int, projection: Tensor) -> None:
        super().__init__()
        self.heads = heads
        self.register_buffer("projection", projection, persistent=False)
        self.places = nn.Parameter(torch.randn(most, dim))
        self.encode = nn.Linear(3 * dim, 2 * dim)
        self.encoded = nn.LayerNorm(2 * dim)
        self.rows = nn.Linear(2 * dim, CHANNELS * columns // DOWN)
        self.row_norm = nn.LayerNorm(columns // DOWN)
        wide = CHANNELS * heads
        shape: dict[str, Any] = {"dilation": 2, "padding": (0, 2)}
        self.convolve = nn.ModuleList(nn.Conv2d(wide, wide, 3, **shape) for _ in range(2))
        self.join = nn.Conv2d(wide, heads, 1)
        self.norm = nn.LayerNorm(columns)
        self.scale = nn.Linear(2 * dim, 2)

    def forward(
        self, q: Float[Tensor, "batch heads tokens dim"], k: Float[Tensor, "batch heads tokens dim"],
        v: Float[Tensor, "batch heads tokens dim"], ranks: Int[Tensor, "batch tokens"],
        valid: Bool[Tensor, "batch tokens"] | None, own: dict[str, Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """(logits of Â [batch, heads, tokens, columns], (a, b), mean of the values so far).

        Args:
            q: queries.
            k: keys.
            v: values.
            ranks: places of the tokens in their rows.
            valid: which of them are no padding.
            own: what the call before left; what this one leaves takes its place.
        """
        there = None if valid is None else valid[:, None, :, None]
        places = self.places[ranks.clamp(min=0)][:, None].expand_as(v)
        k = self._features(k)
        if there is not None:
            k, v = k.masked_fill(~there, 0.0), v.masked_fill(~there, 0.0)
        context, own["state"] = ops.recurrence(
            self._features(q), k, torch.cat((places, v), -1), normalize=True, initial_state=own["state"]
        )
        z = gelu(self.encoded(self.encode(torch.cat((context, v), -1))))
        rows = self.rows(z).unflatten(-1, (CHANNELS, -1)).transpose(2, 3).flatten(1, 2)
        rows = self.row_norm(rows)
        for name, convolution in zip(("before", "between"), self.convolve, strict=True):
            if there is not None:
                rows = rows.masked_fill(~there, 0.0)
            earlier = own[name]
            rows = pad(rows, (0, 0, REACH, 0)) if earlier is None else torch.cat((earlier, rows), 2)
            own[name] = rows[:, :, -REACH:]
            rows = convolution(rows).relu()
        logits = self.norm(self.join(rows.repeat_interleave(DOWN, dim=-1)))
        total = v.cumsum(2) if own["sum"] is None else v.cumsum(2) + own["sum"]
        own["sum"] = total[:, :, -1:]
        return logits, self.scale(z), total / (ranks.clamp(min=0) + 1)[:, None, :, None].to(v.dtype)

    def _features(self, x: Tensor) -> Tensor:
        found: Tensor = (x @ self.get_buffer("projection").mT * x.shape[-1] ** -0.25).relu() + 1e-3
        return found


def features(dim: int, seed: int) -> Float[Tensor, "features dim"]:
    """P: ⌊d ln d⌋ directions, orthogonal in groups of d, as long as normal ones."""
    count, drawn = max(1, int(dim * math.log(dim))), torch.Generator().manual_seed(seed)
    normal = torch.randn(-(-count // dim), dim, dim, generator=drawn)
    lengths = torch.randn(count, dim, generator=drawn).norm(dim=-1, keepdim=True)
    found: Tensor = torch.linalg.qr(normal).Q.mT.flatten(0, 1)[:count] * lengths
    return found


def blend(heads: Tensor, scales: Float[Tensor, "batch heads tokens 2"], mean: Tensor) -> Tensor:
    """σ(a) σ(b) y + (1 − σ(b)) mean."""
    a, b = scales.sigmoid()[..., :1], scales.sigmoid()[..., 1:]
    return a * b * heads + (1 - b) * mean


def column_of(
    count: Int[Tensor, "batch queries"], ranks: Int[Tensor, "batch keys"], columns: int
) -> Int[Tensor, "batch queries keys"]:
    """Which column is stretched to each key, for queries that have so many: that of its middle."""
    among = (columns * (2 * ranks[:, None] + 1) - 1) // (2 * count.clamp(min=1)[..., None])
    return among.clamp(0, columns - 1)


def chosen(
    scores: Float[Tensor, "batch heads queries columns"], count: Int[Tensor, "batch queries"], keep: int
) -> Bool[Tensor, "batch heads queries columns"]:
    """The largest numbers of all heads of a query."""
    heads, columns = scores.shape[1], scores.shape[-1]
    flat = scores.detach().float().softmax(-1).transpose(1, 2).flatten(2)
    most = (heads * keep * columns / count.clamp(min=1)).round().clamp(1, heads * columns)
    among = torch.arange(heads * columns, device=scores.device) < most[..., None]
    order = flat.argsort(dim=-1, descending=True, stable=True)
    found = torch.zeros_like(among).scatter(-1, order, among)
    return found.view(*found.shape[:2], heads, columns).transpose(1, 2)


def stretched(
    columns: Bool[Tensor, "batch heads queries columns"], count: Int[Tensor, "batch queries"],
    ranks: Int[Tensor, "batch keys"],
) -> Bool[Tensor, "batch heads queries keys"]:  # fmt: skip
    """Columns as keys, of which a query has `count`."""
    at = column_of(count, ranks, columns.shape[-1])[:, None].expand(-1, columns.shape[1], -1, -1)
    return columns.gather(-1, at) & (ranks[:, None, None] < count[:, None, :, None])


def keys_read(
    scores: Float[Tensor, "batch heads queries columns"], at: Int[Tensor, "batch queries"],
    ranks: Int[Tensor, "batch keys"], keep: int,
) -> Bool[Tensor, "batch heads queries keys"]:  # fmt: skip
    """The mask of queries that stand at `at` among keys: what is chosen, and their own keys."""
    own = ranks[:, None, None] == at[:, None, :, None]
    return stretched(chosen(scores, at + 1, keep), at + 1, ranks) | own


def _modules(model: nn.Module) -> dict[int, Any]:
    """The attention of each layer."""
    return {
        layer: found for layer, modules in layers_of(model).items() for found in modules
        if is_attention(found)
    }  # fmt: skip
