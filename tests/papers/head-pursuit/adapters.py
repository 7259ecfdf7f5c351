"""Adapters of head pursuit to published numbers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attlas.analyses.head_pursuit import HeadPursuit, atoms, pursued
from attlas.contract.cases import Case, Check, adapter
from attlas.inspect.subject import Subject
from reference.model import smollm2_of


@adapter("head-pursuit-somp", mechanism="head-pursuit")
def somp(case: Case) -> Iterator[Check]:
    """The pursuit alone."""
    config, x, dictionary = case.config, case.inputs["X"], case.inputs["dictionary"]
    case.states(criterion="l1")
    case.without_effect("config.seed")
    case.sizes(x, "samples dim")
    case.sizes(dictionary, "atoms dim")
    found = pursued(x, dictionary, config["k"], centred=config["centering"])
    yield case.compare("out.chosen", found.chosen)
    yield case.compare("out.weights_full", found.coefficients)
    yield case.compare("out.weights", found.coefficients.norm(dim=0))
    yield case.compare("out.recon", found.reconstruction)
    yield case.compare("out.evr", found.explained)


@adapter("head-pursuit-smollm2", mechanism="head-pursuit")
def whole_model(case: Case) -> Iterator[Check]:
    """All heads of the real model at the last token of some prompts, over a concept's rows."""
    from attlas.models.load import load_tokenizer

    model, tokenizer = smollm2_of(case), load_tokenizer("smollm2")
    case.states(dictionary="L2-normalised rows of the (tied) unembedding of in.concept_ids")
    case.without_effect("config.concept")  # the name of those words
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    given = tokenizer(case.config["prompts"], return_tensors="pt", padding=True, padding_side="left")
    subject = Subject(model, given["input_ids"], given["attention_mask"], tokenizer=tokenizer)
    dictionary = atoms(subject, case.inputs["concept_ids"].long())
    with torch.no_grad():
        written = HeadPursuit(at="last").written(subject)
        found = [[pursued(x, dictionary, case.config["k"]) for x in layer] for layer in written]
    explained = torch.stack([torch.stack([p.explained[-1] for p in layer]) for layer in found])
    yield case.compare("out.explained_variance", explained)
    chosen = torch.stack([torch.stack([p.chosen for p in layer]) for layer in found])
    # Atoms that tie may swap: only another variance tells that other atoms are wrong.
    alike = torch.isclose(
        explained, case.outs["explained_variance"], rtol=case.rtol, atol=case.atol
    )
    wrong = (chosen != case.outs["chosen"]).any(-1) & ~alike
    yield Check("out.chosen: heads of other atoms and another variance", float(wrong.sum()), 0.0)
