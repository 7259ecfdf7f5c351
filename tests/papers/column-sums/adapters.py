"""How the published metric of attention sinks maps to ours."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from attlas.attach.call import Call, ForwardPass
from attlas.contract.cases import Case, Check, adapter
from attlas.parts.record.column_sums import ColumnSums


@adapter("attention-sink-metric", mechanism="column-sums")
def sink_metric(case: Case) -> Iterator[Check]:
    """Published weights [samples, layers, heads, tokens, tokens] through the recorder."""
    weights = case.inputs["attention"]
    case.sizes(weights, "samples layers heads tokens _")
    recorder = ColumnSums()
    tokens = weights.shape[-1]
    empty = torch.zeros(weights.shape[0], weights.shape[2], tokens, 1)
    for layer in range(weights.shape[1]):
        call = Call(
            layer, nn.Identity(), empty, empty, empty, 1.0, None, ForwardPass(length=tokens)
        )
        recorder.update(call, weights[:, layer], torch.arange(tokens), torch.arange(tokens))
    if "importance" in case.mids:
        yield case.compare("mid.importance", recorder.importance().transpose(0, 1))
    yield case.compare("out.metric", recorder.sink_metric(float(case.config["epsilon"])))
    exceeds = recorder.importance()[..., 0] > case.config["epsilon"]
    yield case.compare("out.metric_per_head", exceeds.float().mean(dim=1))
