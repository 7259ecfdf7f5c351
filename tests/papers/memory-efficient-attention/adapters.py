"""How published functions of queries, keys and values map to our ops."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attlas import ops
from attlas.contract.cases import Case, Check, adapter


@adapter("memory-efficient", mechanism="memory-efficient-attention")
def memory_efficient(case: Case) -> Iterator[Check]:
    config, bias, mask = case.config, case.inputs.get("bias"), case.inputs.get("mask")

    def add_bias(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        assert bias is not None
        full = bias.expand(len(q), *bias.shape[1:])
        return score + full[b, h % bias.shape[1], q_idx, kv_idx]

    q, k, v = (case.inputs[name] for name in "qkv")
    case.sizes(q, "B heads Tq head_dim")
    case.states(Tk=k.shape[2], dtype=str(q.dtype).removeprefix("torch."))
    out, _ = ops.memory_efficient(
        q, k, v, mask=None if mask is None else mask.bool(),
        score_mod=None if bias is None else add_bias, q_offset=0,
        q_chunk=config.get("query_chunk_size", 256), k_chunk=config.get("key_chunk_size"),
    )  # fmt: skip
    if mask is not None:
        # Of a row that sees nothing the published code gives the mean of the values; ours gives 0.
        seen = mask.bool().any(-1).expand(out.shape[:3])[..., None]
        out = torch.where(seen, out, case.outs["o"])
    yield case.compare("out.o", out)
