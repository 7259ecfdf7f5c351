"""What passes: the residual stream, what attention and MLP add, outputs of heads, their q, k and v.

    residual[l], attention[l], mlp[l]   [batch, tokens, width]       final   [batch, tokens, width]
    heads[l]                            [batch, tokens, heads, dim]  before the output projection
    q[l], k[l], v[l]                    likewise; rotated, keys and values with their own heads

With `gradients`, what is recorded is part of the computation, so that `torch.autograd.grad` of any scalar
of the output takes it. No attention weights are held.

Cost: what is asked for is kept, one tensor a layer.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from attlas.attach.call import Call, ForwardPass, Site
from attlas.attach.part import Recorder
from attlas.attach.stream import OF_CALLS, POINTS
from attlas.catalog.registry import mechanism
from attlas.errors import UnknownName, UserError
from attlas.options import option


@mechanism("activations", paper="", example={"what": ("residual", "heads", "q", "k", "v")})
class Activations(Recorder):
    """Records what passes at chosen points, {point: [layers, batch, tokens, ...]}.

    The record is of one sequence: it grows call by call while a cache carries the sequence on, and
    starts anew with the next one. "final" has one layer.
    """

    without = ("heads",)  # all heads are recorded

    what: tuple[str, ...] = option(
        "points: residual, attention, mlp, final, heads, q, k, v", kw_only=False
    )
    gradients: bool = option("whether what is recorded may be differentiated by", default=False)

    def setup(self) -> None:
        """Refuse points that are none; nothing is recorded yet."""
        super().setup()
        for point in self.what:
            if point not in (*POINTS, *OF_CALLS):
                raise UnknownName("point of what", point, (*POINTS, *OF_CALLS))
        self.points = tuple(point for point in POINTS if point in self.what)
        self.wants_gradients = self.gradients
        self._found: defaultdict[tuple[str, int], list[Tensor]] = defaultdict(list)

    def begin(self, forward_pass: ForwardPass) -> None:
        """A call without a past begins a new sequence."""
        if forward_pass.offset == 0:
            self._found.clear()

    def take_back(self, seen: int) -> None:
        """Forget what tokens behind the first `seen` left."""
        for known in self._found.values():
            room, kept = seen, []
            for block in known:
                if room > 0:
                    kept.append(block[:, :room])
                room -= block.shape[1]
            known[:] = kept

    def stream(self, site: Site, x: Float[Tensor, "batch query width"]) -> Tensor | None:
        """Keep what passes."""
        return self._kept(site.point, 0 if site.point == "final" else site.layer, x)

    def output(
        self, call: Call, heads: Float[Tensor, "batch query heads value_dim"]
    ) -> Float[Tensor, "batch query heads value_dim"]:
        """Keep the heads' outputs."""
        return self._kept("heads", call.layer, heads) if "heads" in self.what else heads

    def observe(self, call: Call) -> None:
        """Keep queries, keys and values of this call's own tokens."""
        if self.gradients:
            return  # they were kept on their way
        count = call.q.shape[2]
        for point, x in (("q", call.q), ("k", call.k), ("v", call.v)):
            if point in self.what:
                self._kept(point, call.layer, x[:, :, -count:].transpose(1, 2))

    def position(self, call: Call, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Keep queries and keys that are differentiated by."""
        return self._differentiable(call, "q", q), self._differentiable(call, "k", k)

    def read_values(self, call: Call, v: Tensor) -> Tensor:
        """Keep values that are differentiated by."""
        return self._differentiable(call, "v", v)

    def _differentiable(self, call: Call, point: str, x: Tensor) -> Tensor:
        if not self.gradients or point not in self.what:
            return x
        if x.shape[2] != call.q.shape[2]:
            raise UserError(f"gradients of {point!r} are of a text that is read at once, without a cache")
        return self._kept(point, call.layer, x.transpose(1, 2)).transpose(1, 2)

    def _kept(self, point: str, layer: int, x: Tensor) -> Tensor:
        if not self.gradients:
            self._found[point, layer].append(x.detach())
            return x
        x = x if x.requires_grad else x.detach().requires_grad_()
        self._found[point, layer].append(x)
        return x

    def layer(self, point: str, layer: int) -> Tensor:
        """What was recorded at one point of one layer, itself where it came in one call.

        Raises:
            KeyError: nothing was.
        """
        blocks = self._found.get((point, layer), [])
        if not blocks:
            raise KeyError(f"nothing was recorded at {point!r} of layer {layer}")
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)

    def result(self) -> dict[str, Any]:
        """What passed, by point."""
        found = {}
        for point in self.what:
            layers = sorted(number for name, number in self._found if name == point)
            found[point] = torch.stack([self.layer(point, number) for number in layers])
        return found
