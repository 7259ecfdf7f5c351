"""Adapters of activation patching and direct attribution to published numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attlas.contract.cases import Case, Check, adapter
from attlas.inspect.attribution import attribution
from attlas.inspect.prompts import Prompts
from attlas.inspect.runs import differences, patched_heads
from reference.model import smollm2_of

#: Outputs of the case, and what is replaced by its value in the clean run.
POINTS = {"patch_head_output": "heads", "patch_query": "q", "patch_pattern": "pattern"}


@adapter("activation-patching-ioi-smollm2", mechanism="mcq-correct-letter-heads")
def indirect_objects(case: Case) -> Iterator[Check]:
    """Each head's effect and attribution; queries are replaced behind their rotation, at equal places."""
    model = smollm2_of(case)
    case.without_effect("config.clean", "config.corrupted")  # of ids that are given
    case.states(note="no BOS token; answers are [indirect object, subject] token ids with leading space")
    clean, corrupted = (case.inputs[f"{n}_ids"].long() for n in ("clean", "corrupted"))
    prompts = Prompts(clean, corrupted, case.inputs["answers"].long())
    for name, found in zip(("clean", "corrupted"), differences(model, prompts), strict=True):
        yield case.compare(f"out.logit_diff_{name}", found)
    of = torch.zeros(len(prompts), model.config.vocab_size)
    of.scatter_(1, prompts.answers, torch.tensor([[1.0, -1.0]]).expand(len(prompts), -1))
    parts = attribution(model, clean, of)
    yield case.compare("out.direct_logit_attribution", parts.heads.mean(dim=-1))
    for name, point in POINTS.items():
        if name in case.outs:
            yield case.compare(f"out.{name}", patched_heads(model, prompts, point=point))
