"""What each head writes towards an answer itself, without what later layers make of it.

    direct(h) = norm'(z_h W_O,h) · (W_U[right] − W_U[wrong])        at the last token

norm' is the last norm with the size that the run gave it, so that the heads, the MLPs, the embedding and
constants add up to the logit difference.

Cost: one run of the prompts.
Source: "Interpretability in the Wild".
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from attlas.catalog.registry import mechanism
from attlas.inspect.readout import readout
from attlas.inspect.runs import kept
from attlas.inspect.subject import Subject
from attlas.inspect.weights import head_weights
from attlas.kinds.analysis import Analysis, Findings, Scores


@mechanism("direct-attribution", paper="")
class DirectAttribution(Analysis):
    """The share of the logit difference that each head writes itself."""

    needs = "prompts"
    inspects = "circuits"

    def check(self, subject: Subject) -> None:
        """Refuse models whose last norm or unembedding is not known."""
        readout(subject.model)

    def run(self, subject: Subject, tick: Callable[[float], None]) -> Findings:
        """Attributions of heads, and of layers' MLPs."""
        assert subject.prompts is not None
        prompts, model = subject.prompts.to(subject.device), subject.model
        run = kept(model, prompts.clean, ("heads", "mlp", "final"))
        read = readout(model)
        towards = read.weight.T[prompts.answers]
        towards = towards[:, 0] - towards[:, 1]
        final = run.passed["final"][0][:, -1]

        def told(piece: torch.Tensor) -> torch.Tensor:
            """[..., pairs, width] -> the mean over pairs of what it says."""
            return (read.linear(final, piece) * towards).sum(-1).mean(-1)

        rows = []
        for layer in range(subject.layers):
            weights = head_weights(model, layer)
            z = run.passed["heads"][layer][:, -1]
            rows.append(told(torch.einsum("bhd,hdw->hbw", z, weights.o)))
            tick((layer + 1) / subject.layers)
        heads = torch.stack(rows).double().cpu()
        mlps = told(run.passed["mlp"][:, :, -1]).double().cpu()
        meaning = f"writes towards the answer of {prompts.name}, in logits"
        return Findings({"direct": Scores(heads, meaning)}, {"mlp": mlps})
