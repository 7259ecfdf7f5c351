"""How the published block attention maps to ours."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attlas import masks, ops
from attlas.adapt.block_attention import block_mask
from attlas.contract.cases import Case, Check, adapter


@adapter("block-attention", mechanism="block-attention-rag")
def block_attention(case: Case) -> Iterator[Check]:
    """Softmax attention under the mask of blocks."""
    q, k, v = (case.inputs[name] for name in "qkv")
    case.sizes(q, "B heads _ head_dim")
    sizes = [*case.config["local_blocks"], case.config["global_block"]]
    block = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[None]
    mask = block_mask(block, block == len(sizes) - 1)
    if "mask" in case.mids:
        ours = masks.dense(mask, q.shape[2], k.shape[2])[0, 0]
        yield Check("mid.mask", float((ours != case.mids["mask"].bool()).sum()), 0.0)
    yield case.compare("out.o", ops.attend(q, k, v, mask=mask))
