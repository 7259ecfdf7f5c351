"""Titans' neural memory: a small network that learns keys' values while it reads, and is its own state.

    u_t = −θ_t ∇_M |M(k_t) − v_t|² / d       at the weights M of the last multiple of `batch` tokens
    S_t = η_t S_{t−1} + u_t                  surprise, with the momentum of what was surprising before
    M_t = (1 − α_t) M_{t−1} + S_t            y_t = M_t(q_t)

M is an MLP a head, with GELU between its layers; `residual` makes it x + LayerNorm(MLP(x)) (1 + γ). Its
first weights are trained as all others are. θ = `max_step` sigmoid(·) of each token, η and α sigmoids of
the mean of `chunk` tokens: a chunk's u is the sum of its tokens', S and M change once a chunk, and a
token reads the memory that all chunks up to it have left. Gradients of many tokens at the same M are
taken at once, and S and M are linear recurrences: all that is sequential goes from `batch` to `batch`.

Cost: 6·n·|M| multiply-adds a head for reading and gradients, and n / chunk memories of |M| numbers
between two passes; memory linear in n, a state of 3·|M| numbers.
Reduces to the delta rule with a linear memory (`depth=1`, no residual), no momentum, α = 0, and chunks
and batches of one token; to no registered mechanism.
Source: "Titans: Learning to Memorize at Test Time", by the widely used program of a third party, as the
authors published none. There a chunk has one η and one α, θ multiplies the mean of |M(k) − v|² over its d
channels, where the paper has the sum, and one head's output is neither gated nor projected, which here it
is. The paper is the case of `chunk=1` and a `max_step` of the width of a head, which recalls far better
than 1 where texts are longer than those that were trained on (docs/claims.md). SiLU, ℓ2-norms and short
convolutions of q, k and v are the paper's; the width of the convolutions is our choice.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad, rms_norm, silu

from attlas import ops
from attlas.attention import Attention
from attlas.bases.mlp import MemoryMLP, State
from attlas.bases.packing import heads_at_places, place_heads, ranks, short_convolution
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.inputs import Inputs
from attlas.options import option
from attlas.supports import Supports

_NO_MAP = "a memory that is not linear in its values has no map of weights"


class Grid(NamedTuple):
    """Where tokens stand in slots, the first of which begins a chunk.

    Attributes:
        at: slots of the tokens of an unfinished chunk, then of this pass's tokens; −1 at padding.
        first: the slot of every row where its unfinished chunk begins.
        stop: one behind the last token of every row.
        chunks: how many chunks a row may have finished; one more has slots.
        skipped: chunks since the gradients' weights changed that lie before the slots.
    """

    at: Integer[Tensor, "batch tokens"]
    first: Integer[Tensor, "batch 1"]
    stop: Integer[Tensor, "batch 1"]
    chunks: int
    skipped: int


@mechanism("titans-neural-memory", example={"chunk": 2})
class NeuralMemory(Attention):
    """A memory of the past in the weights of a network, written by gradient descent while reading."""

    supports = Supports(
        bidirectional=False, cross=False, masks="padding", cache="state", maps=False,
        one_length="torch.export cannot take the gradients that the memory itself goes by",
    )  # fmt: skip
    changes = ("aggregate",)  # `attend` writes values into a network's weights and reads them there
    beyond = (
        "project: convolutions, activations and norms of queries, keys and values",
        "normalize: there are no weights to normalise",
    )
    expected_failures: ClassVar[dict[str, str]] = {
        "fused-is-staged": _NO_MAP, "twice-the-plain-error": _NO_MAP,
    }  # fmt: skip

    chunk: int = option(
        "tokens that are written together, with one momentum and one forgetting", default=16,
        at_least=1,
    )  # fmt: skip
    batch: int | None = option(
        "tokens whose gradients are taken at the same weights, a multiple of chunk; all unless given, "
        "at the first weights", default=None, at_least=1,
    )  # fmt: skip
    depth: int = option("layers of the memory", default=2, at_least=1)
    expansion: float = option("width of its hidden layers, in head widths", default=4.0, above=0)
    residual: bool = option(
        "whether the memory adds its normalised output to its input", default=True
    )
    momentum: bool = option("whether S remembers; without, S_t = u_t", default=True)
    max_step: float = option("greatest θ; the paper's is the width of a head", default=1.0, above=0)
    activation: bool = option("whether q, k and v go through a SiLU", default=True)
    qk_norm: Literal["none", "l2", "rms"] = option(
        "of queries and keys; 'rms' has a trained gain", default="l2"
    )
    kernel: int = option(
        "tokens that the convolutions of q, k and v see; 1 for none", default=4, at_least=1
    )

    def setup(self) -> None:
        """Norms, convolutions and gates, and the memory's first weights.

        Raises:
            ValueError: a batch that is no multiple of the chunk, key heads other than the heads,
                dropout, or a position encoding that adds to scores.
        """
        super().setup()
        if self.batch is not None and self.batch % self.chunk:
            raise UserError(f"batch must be a multiple of chunk={self.chunk}, got {self.batch}")
        if self.kv_heads != self.heads:
            raise UserError(
                f"kv_heads must be heads={self.heads}, one memory each, got {self.kv_heads}"
            )
        if self.dropout:
            raise UserError(
                f"dropout must be 0, as there are no weights to drop, got {self.dropout}"
            )
        if self.score_mod is not None:
            raise UserError("position: a bias on scores means nothing without scores")
        self.read_norm, self.write_norm = _norm(self.dim), _norm(self.dim)
        wide = self.heads * self.head_dim
        self.convs = nn.ModuleList(
            nn.Conv1d(wide, wide, self.kernel, groups=wide, bias=False)
            for _ in range(3 if self.kernel > 1 else 0)
        )
        if self.qk_norm == "rms":
            self.q_gain = nn.Parameter(torch.zeros(self.heads, 1, self.head_dim))
            self.k_gain = nn.Parameter(torch.zeros(self.heads, 1, self.head_dim))
        self.step_proj = nn.Linear(self.dim, self.heads)
        self.decay_proj = nn.Linear(self.dim, self.heads)
        self.momentum_proj = nn.Linear(self.dim, self.heads) if self.momentum else None
        self.gate_proj = nn.Linear(self.dim, self.heads, bias=False) if self.heads > 1 else None
        self.memory = MemoryMLP(
            self.heads, self.head_dim, depth=self.depth, expansion=self.expansion,
            residual=self.residual,
        )  # fmt: skip

    def project(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each through its convolution, activation and norm."""
        read, write = self.read_norm(inputs.x), self.write_norm(inputs.x)
        found = [self.q_proj(read), self.k_proj(write), self.v_proj(write)]
        for i, conv in enumerate(self.convs):
            assert isinstance(conv, nn.Conv1d)
            name = f"convolution {i}"
            found[i], last = short_convolution(
                found[i], conv, inputs.valid_now, inputs.recall(name)
            )  # fmt: skip
            inputs.remember(name, last)
        if self.activation:
            found = [silu(x) for x in found]
        q, k, v = (self.split_heads(x) for x in found)
        if self.qk_norm == "l2":
            q, k = ops.unit(q), ops.unit(k)
        elif self.qk_norm == "rms":
            eps = torch.finfo(torch.float32).eps
            q = rms_norm(q, q.shape[-1:], eps=eps) * (self.q_gain + 1)
            k = rms_norm(k, k.shape[-1:], eps=eps) * (self.k_gain + 1)
        return q, k, v

    def gates(self, inputs: Inputs) -> Float[Tensor, "batch heads tokens gates"]:
        """Of every token: θ, and what α and η are the sigmoids of."""
        x = self.write_norm(inputs.x)
        step = self.max_step * self.step_proj(x).sigmoid()
        rest = [p(x) for p in (self.decay_proj, self.momentum_proj) if p is not None]
        return torch.stack((step, *rest), dim=-1).transpose(1, 2)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries head_dim"]:
        """Write chunk by chunk, read what each token's chunk has left."""
        dtype, tokens, grid = v.dtype, v.shape[2], self.grid(inputs)
        wide = torch.promote_types(dtype, torch.float32)
        new = torch.cat((k, v, self.gates(inputs)), dim=-1).to(wide)
        memories, state = self.write(
            self.with_unfinished(new, grid, inputs), grid, self.state(inputs, wide)
        )  # fmt: skip
        self.remember(state, inputs)
        slots = (grid.chunks + 1) * self.chunk - 1
        heads = self.read(memories, place_heads(q.to(wide), grid.at[:, -tokens:], slots))
        return heads_at_places(heads, grid.at[:, -tokens:]).to(dtype)

    def read(
        self, memories: Float[Tensor, "batch heads chunks_and_one numbers"],
        q: Float[Tensor, "batch heads slots head_dim"],
    ) -> Float[Tensor, "batch heads slots head_dim"]:  # fmt: skip
        """Every slot's query to the memory that the chunks up to it have left."""
        size, slots = self.chunk, q.shape[2]
        # The last of a chunk reads what that chunk has left, so that queries move one slot on.
        q = pad(q, (0, 0, 1, memories.shape[2] * size - 1 - slots)).unflatten(2, (-1, size))
        heads: Tensor = self.memory(memories, q).flatten(2, 3)
        return heads[:, :, 1 : slots + 1]

    def grid(self, inputs: Inputs) -> Grid:
        """Slots for the tokens of an unfinished chunk, which stand in front, and for this pass's."""
        tokens, size, valid = inputs.x.shape[1], self.chunk, inputs.valid
        seen, period = inputs.key_positions.shape[-1] - tokens, self.batch or self.chunk
        if valid is None:  # all rows are at the same place, and slots may begin where they are
            valid = torch.ones(
                len(inputs.x), seen + tokens, dtype=torch.bool, device=inputs.x.device
            )
            skipped, most = seen % period // size, seen % size
        else:
            skipped, most = 0, min(seen, period - 1)
        before = valid[:, :seen].sum(-1, keepdim=True) % period - skipped * size
        part = before % size
        left = torch.arange(size - 1, device=part.device) < part
        at = ranks(torch.cat((left, valid[:, seen:]), dim=1))
        at = at.where(at < 0, at + before - part)
        stop = before + valid[:, seen:].sum(-1, keepdim=True)
        return Grid(at, before - part, stop, (most + tokens) // size, skipped)

    def with_unfinished(
        self, new: Float[Tensor, "batch heads tokens width"], grid: Grid, inputs: Inputs
    ) -> Float[Tensor, "batch heads slots width"]:
        """In slots: these tokens, and those of the unfinished chunk before them."""
        size, before = self.chunk, inputs.recall("unfinished")
        if before is None:
            before = new.new_zeros(*new.shape[:2], size - 1, new.shape[-1])
        whole = torch.cat((before, new), dim=2)
        placed = place_heads(whole, grid.at, (grid.chunks + 1) * size)
        if size > 1:
            last = grid.stop - grid.stop % size + torch.arange(size - 1, device=new.device)
            inputs.remember("unfinished", placed.take_along_dim(last[:, None, :, None], dim=2))
        return placed

    def write(
        self, written: Float[Tensor, "batch heads slots width"], grid: Grid, state: State
    ) -> tuple[Float[Tensor, "batch heads chunks_and_one numbers"], State]:
        """(the memory before the first chunk and after every one, the state behind the last).

        Args:
            written: keys, values and gates, side by side.
            grid: which chunks are whole.
            state: what the pass before has left.
        """
        d, size = self.head_dim, self.chunk
        written = written.unflatten(2, (-1, size))[:, :, : grid.chunks]
        k, v, step, logits = written.split([d, d, 1, written.shape[-1] - 2 * d - 1], dim=-1)
        begin = torch.arange(grid.chunks, device=k.device) * size
        idle = ~((begin >= grid.first) & (begin + size <= grid.stop))[:, None]
        keep = logsigmoid(-logits[..., 0].mean(-1)).masked_fill(idle, 0.0)
        carry = logsigmoid(logits[..., -1].mean(-1)).masked_fill(idle, 0.0)
        found = [state.memory[:, :, None]]
        for part, stop in self.rounds(grid):
            after, state = self.memory.learn(
                k[:, :, part], v[:, :, part], step[:, :, part], idle[..., part], keep[..., part],
                carry[..., part] if self.momentum else None, state,
            )  # fmt: skip
            found.append(after)
            if stop is not None:
                passed = (grid.stop >= stop)[..., None]
                state = state._replace(base=torch.where(passed, state.memory, state.base))
        return torch.cat(found, dim=2), state

    def state(self, inputs: Inputs, dtype: torch.dtype) -> State:
        """What the pass before has left; the first weights at the beginning."""
        start = self.memory.row().to(dtype).expand(len(inputs.x), -1, -1)
        first = State(start, start, torch.zeros_like(start))
        known = (inputs.recall(name) for name in State._fields)
        return State(*(a if b is None else b for a, b in zip(first, known, strict=True)))

    def remember(self, state: State, inputs: Inputs) -> None:
        """Keep what the next pass cannot know otherwise."""
        inputs.remember("memory", state.memory)
        if self.momentum:
            inputs.remember("surprise", state.surprise)
        if self.batch is not None:
            inputs.remember("base", state.base)

    def rounds(self, grid: Grid) -> list[tuple[slice, int | None]]:
        """Chunks whose gradients are taken at the same weights, and the slot where others begin."""
        if grid.chunks == 0:
            return []
        if self.batch is None:
            return [(slice(0, grid.chunks), None)]
        per = self.batch // self.chunk
        return [
            (slice(max(0, stop - per), min(stop, grid.chunks)), stop * self.chunk)
            for stop in range(per - grid.skipped, grid.chunks + per, per)
        ]

    def beside(self, inputs: Inputs) -> Float[Tensor, "batch queries dim"]:
        """Its output for the inputs, and the cache, of a layer that it is a part of."""
        q, k, v = self.project(inputs)
        return self.output(self.attend(q, k, v, inputs), inputs)

    def weigh(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries keys"]:
        """None: what a network answers is no sum of values, so that there is nothing to weigh.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"weights: {_NO_MAP}")

    def output(
        self, heads: Float[Tensor, "batch heads queries head_dim"], inputs: Inputs
    ) -> Float[Tensor, "batch queries dim"]:
        """Heads gated, joined and projected."""
        if self.gate_proj is not None:
            gate = self.gate_proj(self.read_norm(inputs.x)).sigmoid()
            heads = heads * gate.transpose(1, 2)[..., None]
        return super().output(heads, inputs)


def _norm(dim: int) -> nn.RMSNorm:
    return nn.RMSNorm(dim, eps=torch.finfo(torch.float32).eps)
