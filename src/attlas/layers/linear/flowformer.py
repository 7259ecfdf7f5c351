"""Flow attention: queries compete for what keys give, and keys for being asked, as in a network of flows.

    φ = sigmoid                                                    what is never negative flows
    I_t = φ(q_t)·Σ_s φ(k_s)            O_s = φ(k_s)·Σ_t φ(q_t)            into sink t, out of source s
    Î_t = φ(q_t)·Σ_s φ(k_s) / O_s      Ô_s = φ(k_s)·Σ_t φ(q_t) / I_t      the other side's flow being 1
    c_s = S softmax_s(Ô_s)             a_t = sigmoid(Î_t T / S)           competition and allocation
    weights_ts = a_t φ(q_t)·φ(k_s) c_s / I_t

of T queries and S keys. In the causal form t and s end all their sums at themselves, n of them, and

    Î_t = φ(q_t)·(1/n_t) Σ_{s≤t} φ(k_s) n_s / O_s        Ô_s alike        a_t = sigmoid(Î_t)
    c_s = n_s e^{Ô_s} / Σ_{r≤s} e^{Ô_r}

so that a source's strength is fixed when it comes in: six running sums and one recurrence. A tiny ε is
added to both factors of each product of flows, and Ô is kept in [−1, 1].

Cost: 2·n·d² multiply-adds a head, memory linear in n; one state of d × d and four of d a head while
decoding (and two numbers). Dropout needs the n² weights.
Reduces to linear attention with sigmoid features where c and a are 1.
Source: "Flowformer: Linearizing Transformers with Conservation Flows" and its authors' program, which has
ε, Ô's bound, biases, T / S, the causal form and the S of c; its dropout is on outputs, here on weights.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attlas import ops
from attlas.bases.recurrent import Gates, RecurrentAttention
from attlas.catalog.registry import mechanism
from attlas.inputs import Inputs
from attlas.options import option


@mechanism("flowformer", aliases=("flow-attention",))
class Flowformer(RecurrentAttention):
    """Linear attention with competition among sources and an allocation to sinks."""

    supports = replace(RecurrentAttention.supports, masks="padding", queries="all")
    normalized = False
    bias: bool = option("whether the projections have one", default=True)
    eps: float = option("added to both factors of every product of flows", default=1e-6, above=0)

    def features(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Sigmoids, in float32 at least since they are summed up."""
        wide = torch.promote_types(q.dtype, torch.float32)
        return q.to(wide).sigmoid(), k.to(wide).sigmoid()

    def terms(self, q: Tensor, k: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor, Gates]:
        """Queries by their allocation over their flow, and keys by their strength in competition."""
        q, k = self.features(q, k, inputs)
        k = ops.repeated(k, q.shape[1])
        valid = inputs.valid_now
        sources = k.new_ones(len(k), 1, k.shape[2], 1) if valid is None else valid[:, None, :, None].to(k)
        sinks = sources if inputs.context is None else q.new_ones(q.shape[0], 1, q.shape[2], 1)
        form = self._running if inputs.looks_back(self.pattern) else self._whole
        return form(q, k, sinks, sources, inputs)

    def flow(self, x: Tensor, others: Tensor) -> Tensor:
        """What flows between x and the sum of the others, [batch, heads, tokens, 1]."""
        return ((x + self.eps) * (others + self.eps)).sum(-1, keepdim=True)

    def _whole(
        self, q: Tensor, k: Tensor, sinks: Tensor, sources: Tensor, inputs: Inputs
    ) -> tuple[Tensor, Tensor, Gates]:
        """Every sum goes over all sinks or sources; those are 1 at valid tokens, 0 at padding."""
        asked, offered = q * sinks, k * sources
        incoming = self.flow(q, offered.sum(2, keepdim=True))
        outgoing = self.flow(k, asked.sum(2, keepdim=True))
        sink = self.flow(q, (offered / outgoing).sum(2, keepdim=True))
        source = self.flow(k, (asked / incoming).sum(2, keepdim=True)).clamp(-1.0, 1.0)
        count = sources.sum(2, keepdim=True).clamp(min=1.0)
        allocation = (sink * sinks.sum(2, keepdim=True) / count).sigmoid()
        risen = source.exp() * sources
        share = ops.divided(count * risen, risen.sum(2, keepdim=True))
        return allocation * q / incoming, share * k, {}

    def _running(
        self, q: Tensor, k: Tensor, sinks: Tensor, sources: Tensor, inputs: Inputs
    ) -> tuple[Tensor, Tensor, Gates]:
        """Every sum ends at its own token, and goes on from where the cache has left it."""

        def sums(name: str, x: Tensor) -> Tensor:
            before = inputs.recall(name)
            found = x.cumsum(2) if before is None else x.cumsum(2) + before
            inputs.remember(name, found[:, :, -1:])
            return found

        asked, offered = q * sinks, k * sources
        count = sums("count", sources).clamp(min=1.0)
        incoming = self.flow(q, sums("offered", offered)) / count
        outgoing = self.flow(k, sums("asked", asked)) / count
        sink = self.flow(q, sums("offered evenly", offered / outgoing)) / count
        source = self.flow(k, sums("asked evenly", asked / incoming)) / count
        risen = source.clamp(-1.0, 1.0).exp() * sources
        share = ops.divided(count * risen, sums("risen", risen))
        return sink.sigmoid() * q / (incoming * count), share * k, {}
