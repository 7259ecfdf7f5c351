"""Adapters of BERT's attention in numbers to published numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attlas.attach import attach
from attlas.contract.cases import Case, Check, adapter
from attlas.errors import UserError
from attlas.parts.record.bert_attention_statistics import (
    BertAttentionStatistics,
    averaged,
    distances,
    statistics,
)  # fmt: skip

GROUPS = {"cls": ("[CLS]",), "sep": ("[SEP]",), "punct": (".", ",")}


def compared(case: Case, maps: Sequence[Tensor], words: Sequence[Sequence[str]]) -> Iterator[Check]:
    documents = []
    for each, tokens in zip(maps, words, strict=True):
        groups = {name: torch.tensor([t in kind for t in tokens]) for name, kind in GROUPS.items()}
        documents.append(statistics(each, groups))
    for name, found in averaged(documents).items():
        yield case.compare(f"out.{name if 'entropy' in name else f'avg_{name}'}", found)
    even = torch.tensor([math.log(len(tokens)) for tokens in words])
    yield case.compare("out.uniform_entropy", even.mean())
    summed = torch.stack([distances(each.flatten(0, 1)) for each in maps]).sum(0)
    yield case.compare("out.js_distance", summed)


@adapter("bert-attention-statistics", mechanism="bert-attention-statistics")
def on_maps(case: Case) -> Iterator[Check]:
    """Given maps."""
    words = case.config["documents"]
    case.states(kind="op-level, random attention")
    case.without_effect("config.seed")
    maps = [case.inputs[f"attention_{i}"].double() for i in range(len(words))]
    case.sizes(maps[0], "layers heads _ _")
    yield from compared(case, maps, words)


@adapter("bert-attention-statistics-minilm", mechanism="bert-attention-statistics")
def on_minilm(case: Case) -> Iterator[Check]:
    """The real model's maps of some texts."""
    from attlas.models.load import load, load_tokenizer

    config = case.config
    if "MiniLM-L6-v2" not in config["model"]:
        raise UserError(f"config 'model' is {config['model']!r}; the adapter takes only all-MiniLM-L6-v2")
    case.without_effect("config.note")
    model, tokenizer, maps = load("minilm"), load_tokenizer("minilm"), []
    for i, text in enumerate(config["texts"]):
        ids = case.inputs[f"ids_{i}"].long()
        assert tokenizer(text)["input_ids"] == ids.tolist()
        assert tokenizer.convert_ids_to_tokens(ids.tolist()) == config["tokens"][i]
        recorder = BertAttentionStatistics()
        with torch.no_grad(), attach(model, record=[recorder]):
            model(ids[None])
        maps.append(recorder.result()[:, 0].double())
    yield from compared(case, maps, config["tokens"])
