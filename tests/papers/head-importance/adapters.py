"""Adapter of head importance to published scores of a sentence classifier."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attlas.analyses.head_importance import gate_gradients, loss
from attlas.attach import attach
from attlas.contract.cases import Case, Check, adapter
from attlas.errors import UserError
from attlas.hf.models import AutoModelForSequenceClassification
from attlas.inspect.subject import Subject
from attlas.models.load import load, load_tokenizer
from attlas.parts.patch.ablate_heads import AblateHeads
from attlas.parts.record.entropy import Entropy


@cache
def minilm() -> Any:
    return load("minilm"), load_tokenizer("minilm")


def classifier(case: Case) -> Any:
    """The sentence encoder with the case's classifier behind its pooler."""
    if "MiniLM" not in str(case.config["model"]):
        raise UserError(f"config 'model' is {case.config['model']!r}; the adapter takes only MiniLM")
    base, _ = minilm()
    weight = case.params["classifier.weight"]
    config = type(base.config).from_dict(base.config.to_dict() | {"num_labels": len(weight)})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.bert.load_state_dict(base.state_dict())
    model.classifier.load_state_dict({"weight": weight, "bias": case.params["classifier.bias"]})
    return model


@adapter("head-importance-minilm", mechanism="head-importance")
def whole_model(case: Case) -> Iterator[Check]:
    """Importance as published, by a script that sums over all tokens and never clears the gradient of
    its gates: what a batch adds is the absolute value of all gradients so far.
    """
    config, model = case.config, classifier(case)
    case.states(padding="right padding to the longest of the batch")
    case.without_effect("config.seed")  # of the classifier's weights, which are given
    labels, size = torch.tensor(config["labels"]), config["batch_size"]
    tokenizer = minilm()[1]
    batches = []
    for first in range(0, len(labels), size):
        given = tokenizer(config["texts"][first : first + size], padding=True, return_tensors="pt")
        mask = given["attention_mask"]
        batches.append(Subject(model, given["input_ids"], mask, labels=labels[first : first + size]))
    tokens = sum(int(batch.valid.sum()) for batch in batches)

    so_far = torch.cumsum(torch.stack([gate_gradients(batch) for batch in batches]).double(), dim=0)
    raw = so_far.abs().sum(dim=0) / tokens
    layered = raw / (raw.norm(dim=1, keepdim=True) + 1e-20)
    yield case.compare("out.importance_raw", raw)
    yield case.compare("out.importance_layer_normalised", layered)
    spread = (layered - layered.min()) / (layered.max() - layered.min())
    yield case.compare("out.importance_global", spread)

    entropy = torch.zeros_like(raw)
    for batch in batches:
        with torch.no_grad(), attach(model, record=[Entropy()], compile=False) as session:
            batch.forward()
        rows = torch.where(batch.valid[None, :, None], session["entropy"], 0.0)
        entropy += rows.sum(dim=(1, 3)) / tokens
    yield case.compare("out.attention_entropy", entropy)

    given = tokenizer(config["texts"], padding=True, return_tensors="pt")
    together = Subject(model, given["input_ids"], given["attention_mask"], labels=labels)
    base = losses(together)
    yield case.compare("out.base_loss", base)
    layers, heads = raw.shape
    more = torch.zeros_like(raw)
    for layer in range(layers):
        for head in range(heads):
            more[layer, head] = losses(together, AblateHeads(heads={layer: [head]})) - base
    yield case.compare("out.ablation_loss_increase", more)


def losses(subject: Subject, *parts: Any) -> Tensor:
    """The mean loss of all examples."""
    with torch.no_grad(), attach(subject.model, *parts, compile=False):
        return loss(subject)
