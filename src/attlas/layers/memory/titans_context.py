"""Titans with memory as context: segments attend to what a memory recalls of all segments before.

    h_t = M_{t−1}(x_t)                        recollections, one for each token of segment t
    y_t = Attn([p | h_t | x_t])               p persistent tokens
    M_t writes y_t                            o_t = y_t ⊗ M_t(y_t),  a ⊗ b = norm(a) · σ(norm(b))

Nothing goes from one segment to the next but through M. The i-th token of a segment sees the first i of
h and of x, and M_t(y_t) is M when the last whole chunk of tokens up to there has been written: else
tokens would tell of later ones.

Cost: twice the memory's, and 4·n·segment·dim multiply-adds of attention; memory linear in n. A step
recomputes its segment from the first token on, since M stores complete segments only; the state is M's
and a segment of tokens.
Reduces to attention in segments where there are neither p nor M; to no registered mechanism.
Source: "Titans: Learning to Memorize at Test Time", from its equations; its authors published no program.
Which of the two norms in ⊗ is followed by σ is not known to us.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from attlas.bases.mlp import State
from attlas.bases.packing import at_places, place, ranks
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.inputs import Inputs
from attlas.layers.memory.titans import Grid
from attlas.layers.memory.titans_attention import WithMemory
from attlas.options import option

_NO_MAP = "recollections are no values of tokens, so that no map of weights tells what is summed"


@mechanism(
    "titans-memory-as-context", paper="titans-neural-memory", aliases=("titans-mac",),
    example={"persistent": 2, "segment": 4, "memory": {"chunk": 2}},
)  # fmt: skip
class MemoryAsContext(WithMemory):
    """Attention within segments, which begin with what a memory recalls."""

    supports = replace(WithMemory.supports, cache="state", maps=False)
    beyond = ("normalize: there is no map of weights, see `weigh`",)
    expected_failures: ClassVar[dict[str, str]] = {
        "fused-is-staged": _NO_MAP, "twice-the-plain-error": _NO_MAP, "grouped-heads": _NO_MAP,
    }  # fmt: skip
    memory_defaults: ClassVar[Mapping[str, Any]] = {"kernel": 1}

    segment: int = option(
        "tokens of a segment, a multiple of the memory's chunk and batch", default=128, at_least=1
    )

    def setup(self) -> None:
        """Refuse what does not fit into segments.

        Raises:
            ValueError: a segment that is no such multiple, or a memory with convolutions, which would
                look beyond a segment.
        """
        super().setup()
        whole = self.memory.batch or self.memory.chunk
        if self.segment % whole:
            raise UserError(f"segment must be a multiple of memory's {whole}, got {self.segment}")
        if self.memory.kernel != 1:
            raise UserError(f"memory must have kernel=1, got {self.memory.kernel}")

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch one queries dim"]:
        """Segment by segment, from the first token of the unfinished one on."""
        size, state = self.segment, self.memory.state(inputs, _wide(q))
        sides = [inputs.x, *(rearrange(x, "b h t d -> b t (h d)") for x in (q, k, v))]
        at, stop, slots = self.places(inputs)
        tokens = self.with_unfinished(torch.cat(sides, dim=-1), at, stop, slots, inputs)
        found = []
        for begin in range(0, slots, size):
            now = tokens[:, begin : begin + size]
            x, *heads = now.split([side.shape[-1] for side in sides], dim=-1)
            o, after = self.one(x, [self.split_heads(y) for y in heads], stop - begin, state)
            whole, pairs = (stop >= begin + size)[..., None], zip(after, state, strict=True)
            state = State(*(torch.where(whole, new, old) for new, old in pairs))
            found.append(o)
        self.memory.remember(state, inputs)
        return at_places(torch.cat(found, dim=1), at)[:, None]

    def places(
        self, inputs: Inputs
    ) -> tuple[Integer[Tensor, "batch tokens"], Integer[Tensor, "batch 1"], int]:
        """(slots of this pass's tokens, one behind every row's last, how many slots there are)."""
        valid, tokens, size = inputs.valid, inputs.x.shape[1], self.segment
        seen = inputs.key_positions.shape[-1] - tokens
        most = seen % size if valid is None else min(seen, size - 1)
        if valid is None:
            valid = torch.ones(
                len(inputs.x), seen + tokens, dtype=torch.bool, device=inputs.x.device
            )
        before, at = valid[:, :seen].sum(-1, keepdim=True) % size, ranks(valid[:, seen:])
        stop = before + valid[:, seen:].sum(-1, keepdim=True)
        return at.where(at < 0, at + before), stop, -(-(most + tokens) // size) * size

    def with_unfinished(
        self, new: Float[Tensor, "batch tokens width"], at: Tensor, stop: Tensor, slots: int,
        inputs: Inputs,
    ) -> Float[Tensor, "batch slots width"]:  # fmt: skip
        """In slots: the tokens of the unfinished segment and these. The next one is remembered."""
        size, onto = self.segment, new.new_zeros(len(new), slots, new.shape[-1])
        if (before := inputs.recall("segment")) is not None:
            onto = torch.cat((before, onto[:, size - 1 :]), dim=1)
        placed = place(new, at, onto)
        left = stop // size * size + torch.arange(size - 1, device=new.device)
        inputs.remember("segment", at_places(placed, left.clamp(max=slots - 1)))
        return placed

    def one(
        self, x: Float[Tensor, "batch tokens dim"], heads: list[Tensor],
        stop: Integer[Tensor, "batch 1"], state: State,
    ) -> tuple[Float[Tensor, "batch tokens dim"], State]:  # fmt: skip
        """(outputs of one segment, the memory behind it), of which `stop` tokens are there."""
        memory, at = self.memory, torch.arange(x.shape[1], device=x.device)
        own = Inputs(x, None, at, at)  # a segment has no cache, and no padding before its end
        q = memory.project(own)[0].to(state.memory.dtype)
        recalled = memory.memory(state.memory[:, :, None], q[:, :, None])[:, :, 0]
        y = self.inside(memory.output(recalled.to(x.dtype), own), heads, own)
        own = replace(own, x=y)
        q, k, v = memory.project(own)
        written = torch.cat((k, v, memory.gates(own)), dim=-1).to(state.memory.dtype)
        grid = Grid(stop, torch.zeros_like(stop), stop, x.shape[1] // memory.chunk, 0)
        memories, state = memory.write(written, grid, state)
        read = memory.read(memories, q.to(written.dtype)).to(x.dtype)
        return self.gated(y, memory.output(read, own)), state

    def inside(
        self, recalled: Float[Tensor, "batch tokens dim"], heads: list[Tensor], inputs: Inputs
    ) -> Float[Tensor, "batch tokens dim"]:
        """Attention to persistent tokens, recollections and the segment itself."""
        q, k, v = heads
        sides = [self.keys_of(self.tokens.expand(len(q), -1, -1)), self.keys_of(recalled), (k, v)]
        keys, values = (torch.cat(side, dim=2) for side in zip(*sides, strict=True))
        visible = _visible(self.persistent, q.shape[2], q.device)
        return super().output(self.fused(q, keys, values, replace(inputs, pairs=visible)), inputs)

    def weigh(
        self, q: Tensor, k: Tensor, inputs: Inputs
    ) -> Float[Tensor, "batch heads queries keys"]:
        """None: what is summed are recollections of a network beside the values of tokens.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"weights: {_NO_MAP}")

    def output(
        self, heads: Float[Tensor, "batch one queries dim"], inputs: Inputs
    ) -> Float[Tensor, "batch queries dim"]:
        """Segments are put out one by one, so that all is done already."""
        return heads[:, 0]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _visible(
    persistent: int, tokens: int, device: torch.device
) -> Bool[Tensor, "1 1 tokens persistent_and_twice_tokens"]:
    """Persistent tokens, and the recollections and tokens up to one's own."""
    earlier = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    return torch.cat((earlier.new_ones(tokens, persistent), earlier, earlier), dim=1)[None, None]
