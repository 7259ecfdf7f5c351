"""Adapter of the neuron view to published states of MiniLM."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attlas.attach import attach
from attlas.contract.cases import Case, Check, adapter
from attlas.errors import UserError
from attlas.parts.record.multiscale_attention_view import MultiscaleAttentionView

#: The head, query and key whose products the published vectors hold, as their description says.
PAIR = (0, 2, 4)


@adapter("bertviz-neuron-view-minilm", mechanism="multiscale-attention-view")
def neuron_view(case: Case) -> Iterator[Check]:
    """A pair of sentences through the real model: states, weights, blocks between the sentences."""
    from attlas.models.load import load, load_tokenizer

    config = case.config
    if "MiniLM-L6-v2" not in config["model"]:
        raise UserError(f"config 'model' is {config['model']!r}; the adapter takes only all-MiniLM-L6-v2")
    model, tokenizer = load("minilm"), load_tokenizer("minilm")
    given = tokenizer(config["sentence_a"], config["sentence_b"], return_tensors="pt")
    ids = case.inputs["ids"].long()
    assert given["input_ids"][0].tolist() == ids.tolist()
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == config["tokens"]
    view = MultiscaleAttentionView(layers=config["layers"], tokens=len(ids))
    with torch.no_grad(), attach(model, record=[view]):
        model(**given)
    found = view.result()
    q, k, weights = (found[name][:, 0] for name in ("q", "k", "weights"))
    yield case.compare("out.queries", q)
    yield case.compare("out.keys", k)
    yield case.compare("out.attention", weights)
    a = config["tokens"].index("[SEP]") + 1
    yield case.compare("out.attention_ab", weights[..., :a, a:])
    yield case.compare("out.attention_ba", weights[..., a:, :a])
    head, query, key = PAIR
    neurons = view.neurons()
    products = [neurons[layer, head].score(query, key)[0] for layer in config["layers"]]
    yield case.compare("out.elementwise", torch.stack(products))
