"""How Quest's published function maps to ours."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attlas.contract.cases import Case, Check, adapter
from attlas.parts.select.quest import Quest
from attlas.storage.layer import Chosen
from reference.selection import read


def shown(chosen: Chosen, heads: int) -> Tensor:
    """Which tokens a choice reads, [batch, heads, slots]."""
    index = chosen.index.long().repeat_interleave(heads // chosen.index.shape[1], dim=1)
    pages = torch.zeros(*index.shape[:2], -(-chosen.slots // chosen.page) + 1, dtype=torch.bool)
    pages.scatter_(2, index.where(index >= 0, pages.shape[-1] - 1), True)
    return pages[..., :-1].repeat_interleave(chosen.page, dim=-1)[..., : chosen.slots]


@adapter("quest", mechanism="quest-page-selection")
def quest(case: Case) -> Iterator[Check]:
    """One query against keys that count its own; the last page may be short."""
    config = case.config
    case.sizes(case.inputs["q"], "B heads _ head_dim")
    case.sizes(case.inputs["k"], "B kv_heads T head_dim")
    # Theirs keeps three pages at least.
    pages = max(3, config["token_budget"] // config["page_size"])
    case.states(pages_kept=(pages, min(pages, -(-case.inputs["k"].shape[2] // config["page_size"]))))
    part = Quest(
        tokens=pages * config["page_size"], page=config["page_size"], dense_layers=(), shared=False
    )
    chosen, weights, heads = read(part, *(case.inputs[name] for name in "qkv"))
    if "kept" in case.mids:
        yield case.compare("mid.kept", shown(chosen, heads.shape[1]).to(torch.uint8))
    if "attn" in case.mids:
        yield case.compare("mid.attn", weights)
    yield case.compare("out.o", heads)
