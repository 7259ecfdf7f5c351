"""How published retrieval and streaming heads map to ours."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attlas import masks
from attlas.cache.duo_gates import mixture, streaming
from attlas.contract.cases import Case, Check, adapter
from attlas.parts.evict.duo_attention import DuoAttention
from reference.model import answered, tokens_that_differ, top_logits


@adapter("duo-attention", mechanism="duo-attention")
def duo_attention(case: Case) -> Iterator[Check]:
    """The streaming mask, streaming heads alone, and the mixture by gates."""
    config = case.config
    q, k, v = (case.inputs[name] for name in "qkv")
    sizes = {"sinks": config["sink_size"], "recent": config["recent_size"]}
    tokens = q.shape[2]
    case.sizes(q, "B heads T head_dim")
    case.states(kv_heads=k.shape[1])
    mask = masks.dense(streaming(**sizes), tokens, tokens)[0, 0]
    if "mask" in case.mids:
        yield case.compare("mid.mask", mask)
    gates = case.params["full_attention_heads"]
    if "streaming_o" in case.mids:
        yield case.compare("mid.streaming_o", mixture(q, k, v, torch.zeros_like(gates), **sizes))
    yield case.compare("out.o", mixture(q, k, v, gates, **sizes))


@adapter("model-duo-attention", mechanism="duo-attention")
def duo_attention_on_model(case: Case) -> Iterator[Check]:
    """Given gates on the real language model: which heads stream, and what they forget."""
    config = case.config
    question, answer = len(case.inputs["question_ids"]), len(case.outs["generated_ids"])
    part = DuoAttention(
        config["head_compression_ratio"],
        pattern=case.inputs["head_scores"],
        sinks=config["sink_size"],
        recent=config["recent_size"],
        block=question + answer + 1,  # theirs forgets nothing behind the prompt
    )
    found = answered(case, part)
    streams = torch.stack([~part.retrieves[i] for i in sorted(part.retrieves)])
    yield case.compare("out.streaming_mask", streams)
    for number in config["layers_saved"]:
        theirs = case.outs[f"removed_mask.layer{number}"]
        removed = torch.ones(theirs.shape[0], theirs.shape[1] + 1)
        columns = found.layers[number].columns
        columns = torch.arange(theirs.shape[1]) if columns is None else columns[0]
        columns = columns.expand(theirs.shape[0], -1).long()
        at = torch.where(columns < 0, theirs.shape[1], columns)
        yield case.compare(
            f"out.removed_mask.layer{number}", removed.scatter(1, at, 0.0)[:, :-1]
        )  # fmt: skip
    # Theirs hides the pairs and keeps the length: what a cache of ours says it has seen.
    yield case.compare("out.kept_per_layer", torch.tensor([layer.seen for layer in found.layers]))
    yield top_logits(case, found)
    yield tokens_that_differ(case, found)
