"""How HiP's first published search maps to ours."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attlas import ops
from attlas.contract.cases import Case, Check, adapter
from attlas.parts.select.hip import descend


def truncated(cells: Tensor, width: Tensor, length: Tensor) -> Tensor:
    """Where their fractions in single precision put a cell: now and then one too early."""
    return ((cells.double() / width).float().double() * length).long()


@adapter("hip-mask", mechanism="hip-attention")
def hip_mask(case: Case) -> Iterator[Check]:
    """Blocks of one token, no sinks and no window; a query may find itself."""
    config = case.config
    case.sizes(case.inputs["q"], "N T head_dim")
    q, k, v = (case.inputs[name][:, None] for name in "qkv")
    queries, keys = q.shape[2], k.shape[2]
    lengths = torch.arange(keys - queries + 1, keys + 1)
    found = descend(
        q[:, :, :, None], k[:, :, :, None], lengths, keep=config["mask_k"],
        start=round(config["w_start"] / config["scale_up"]), fewest=config["n_patches"],
        growth=config["scale_up"], representative=truncated,
    )  # fmt: skip
    # Every row has come down to single keys, which they write as fractions once more.
    shown = truncated(found, lengths[:, None], lengths[:, None]).where(found >= 0, keys)
    seen = torch.zeros(*found.shape[:3], keys + 1, dtype=torch.bool).scatter_(-1, shown, True)[..., :-1]
    yield case.compare("out.mask", (seen[:, 0] if len(seen) > 1 else seen[0, 0]).to(torch.uint8))
    yield case.compare("out.o_exact_on_mask", ops.attend(q, k, v, mask=seen)[:, 0])
