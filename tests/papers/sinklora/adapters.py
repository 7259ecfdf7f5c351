"""How the published shifted sparse attention maps to ours."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attlas import masks, ops
from attlas.adapt.sinklora import groups
from attlas.contract.cases import Case, Check, adapter


@adapter("s2-attn", mechanism="sinklora")
def shifted_sparse_attention(case: Case) -> Iterator[Check]:
    """Ours, and the leak of the published shift, which rolls the text's end before its beginning."""
    q, k, v = (case.inputs[name] for name in "qkv")
    case.sizes(q, "B heads T head_dim")
    case.sizes(k, "B kv_heads T head_dim")
    size, heads, tokens = case.config["group_size"], q.shape[1], q.shape[2]
    back = size - size // 2  # tokens that the shift rolls from the beginning to the end
    rolled = torch.zeros(heads, tokens, tokens, dtype=torch.bool)
    rolled[heads // 2 :, :back, tokens - size // 2 :] = True
    ours = groups(size, heads)
    leaking = ops.attend(q, k, v, mask=ours | masks.table(rolled))
    # Outputs are rolled back by half of a group rounded down: of odd groups, to the wrong token.
    leaking[:, heads // 2 :] = leaking[:, heads // 2 :].roll(size // 2 - back, dims=2)
    yield case.compare("out.o", leaking)
