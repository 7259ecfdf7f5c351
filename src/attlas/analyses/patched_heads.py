"""Which heads carry an answer: each head's output is taken from the clean run into the corrupted one.

    effect(h) = (LD(corrupted, z_h from clean) − LD(corrupted)) / (LD(clean) − LD(corrupted))

LD is the logit of the right answer less that of the wrong one, a mean over pairs. The circuit is the
heads of largest effect; how faithful it is says what it does alone, every other head replaced by its
mean output over the corrupted prompts:

    faithfulness(k) = LD(clean, the k heads alone) / LD(clean)

Cost: a run of the prompts for each head, and one for each size of circuit.
Source: "Interpretability in the Wild".
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from attlas.catalog.registry import mechanism
from attlas.inspect.runs import faithfulness, mean_heads, patched_heads
from attlas.inspect.subject import Subject
from attlas.kinds.analysis import Analysis, Findings, Scores, Table
from attlas.options import option

#: Shares of the heads that are tried as a circuit.
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)


@mechanism("patched-heads", paper="", example={"last": True})
class PatchedHeads(Analysis):
    """The effect of each head on an answer, and how faithful the best of them are alone."""

    needs = "prompts"
    inspects = "circuits"

    last: bool = option("patch the last token's outputs alone, not those of all tokens", default=False)

    def run(self, subject: Subject, tick: Callable[[float], None]) -> Findings:
        """Effects, the circuit's edges, and its faithfulness by size beside random heads."""
        assert subject.prompts is not None
        prompts = subject.prompts.to(subject.device)
        positions = (-1,) if self.last else None
        found = patched_heads(subject.model, prompts, positions, lambda share: tick(0.8 * share))
        scores = Scores(found.cpu(), f"restores the answer of {prompts.name}")
        order = scores.top(found.numel())
        drawn = torch.randperm(len(order)).tolist()
        means, rows = mean_heads(subject.model, prompts.corrupted), []
        for share in SHARES:
            count = max(1, round(share * len(order)))
            sizes = order[:count], [order[at] for at in drawn[:count]]
            own, other = (faithfulness(subject.model, prompts, heads, means) for heads in sizes)
            rows.append((count, round(own, 3), round(other, 3)))
            tick(0.8 + 0.2 * len(rows) / len(SHARES))
        edges = [
            [layer, head, subject.layers, -1, float(found[layer, head])]
            for layer, head in order[: rows[2][0]]
        ]
        table = Table(
            f"faithfulness on {prompts.name}", ("heads", "of largest effect", "as many random"), rows
        )
        best, value = order[0], float(found[order[0]])
        says = [
            f"On {len(prompts)} pairs of {prompts.name} head {best[0]}.{best[1]} restores {value:.0%} of "
            f"the answer; the {rows[2][0]} heads of largest effect keep {rows[2][1]:.0%} of it alone, as "
            f"many random ones {rows[2][2]:.0%}."
        ]
        return Findings({"effect": scores}, {"circuit": torch.tensor(edges)}, [table], says)
