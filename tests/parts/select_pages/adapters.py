"""Adapters of the selections that page through a cache to published implementations' numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from attlas import ops
from attlas.attach.call import Call, Step
from attlas.cache.factors import decoded, factorised
from attlas.cache.selection import Selection
from attlas.cache.summaries import best
from attlas.calibration import Calibration
from attlas.contract.cases import Case, Check, adapter
from attlas.parts.select.loki import Loki
from attlas.parts.select.lrqk import LRQK
from attlas.parts.select.quest import Quest
from attlas.storage.layer import Chosen, LayerState
from attlas.storage.packed import PackedBody


def read(part: Selection, q: Tensor, k: Tensor, v: Tensor) -> tuple[Chosen, Tensor, Tensor]:
    """(choice, weights, heads) of one query when all keys are packed and summarised."""
    scaling = q.shape[-1] ** -0.5
    state, body = LayerState(0, (0,), scaling=scaling), PackedBody(k, v)
    part.summarize(state, body)
    call = Call(0, nn.Identity(), q, k[:, :, -1:], v[:, :, -1:], scaling, None, Step(length=1))
    chosen = part.choose(state, body, call)
    assert chosen is not None
    tokens = k.shape[2]
    places = torch.eye(tokens, dtype=v.dtype).expand(*k.shape[:2], -1, -1)
    weights, heads = (
        ops.decode(q, [PackedBody(k, x).segment(chosen.index, chosen.page)], scale=scaling)[0]
        for x in (places, v)
    )
    return chosen, weights, heads


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
    part = Quest(
        tokens=config["token_budget"], page=config["page_size"], dense_layers=(), shared=False
    )
    chosen, weights, heads = read(part, *(case.inputs[name] for name in "qkv"))
    if "kept" in case.mids:
        yield case.compare("mid.kept", shown(chosen, heads.shape[1]).to(torch.uint8))
    if "attn" in case.mids:
        yield case.compare("mid.attn", weights)
    yield case.compare("out.o", heads)


@adapter("lrqk", mechanism="lrqk-low-rank-attention")
def lrqk(case: Case) -> Iterator[Check]:
    """The factors of a prompt, the codes of one more token, and the tokens of largest proxy score."""
    config = case.config
    queries, keys, q, k = (case.inputs[name] for name in ("Q", "K", "q", "k"))
    heads = queries.shape[1]
    part = LRQK(
        tokens=config["topk"], rank=config["rank"], sweeps=config["prefill_iterations"],
        refinements=config["decode_iterations"],
    )  # fmt: skip
    state = LayerState(0, (0,))
    step = Step(length=queries.shape[2])
    part.learn(state, Call(0, nn.Identity(), queries, keys, keys, 1.0, None, step))
    sums = (state.tensors[name] for name in ("gram_q", "gram_k", "sizes"))
    m_q, b_q, m_k, b_k = factorised(*sums, part.rank, part.sweeps)
    codes_q = queries.double() @ m_q
    keys, k = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (keys, k))
    codes = keys.double() @ m_k
    for name, ours in (("A_Q", codes_q), ("B_Q", b_q), ("A_K", codes), ("B_K", b_k)):
        yield case.compare(f"out.{name}", ours)
    active = int(re.findall(r"\d+", str(config["active"]))[0])
    recent, of_recent = keys[:, :, -active:].double(), codes[:, :, -active:]
    pull, gram = q.double() @ recent.mT @ of_recent, of_recent.mT @ of_recent
    q_hat, k_hat, b_q, b_k = decoded(q.double(), k.double(), b_q, b_k, pull, gram, part.refinements)
    for name, ours in (("q_hat", q_hat), ("k_hat", k_hat), ("B_Q", b_q), ("B_K", b_k)):
        yield case.compare(f"out.decode.{name}", ours)
    scores = (codes @ q_hat.mT)[..., 0]
    yield case.compare("out.proxy_scores", scores)
    yield case.compare("out.topk_indices", best(scores, part.portion))


@adapter("loki", mechanism="loki-low-rank-keys")
def loki(case: Case) -> Iterator[Check]:
    """Query after query, each over the keys that it may see, all of them packed."""
    config = case.config
    q, k, v = (case.inputs[name] for name in "qkv")
    tokens = k.shape[2]
    top = config["top_k"]
    part = Loki(tokens=top if top > 1 else int(top * tokens), rank=config["top_r"])
    components = {"0.components": case.params["pca_components"].reshape(-1, *k.shape[-1:] * 2)}
    part.found = Calibration("", {}, components)
    weights, heads = torch.zeros(*q.shape[:3], tokens), torch.zeros_like(q)
    for i in range(q.shape[2]):
        seen = i + 1 if config.get("causal", True) else tokens
        found = read(part, q[:, :, i : i + 1], k[:, :, :seen], v[:, :, :seen])[1:]
        weights[:, :, i, :seen], heads[:, :, i] = (x[:, :, 0] for x in found)
    if "attn" in case.mids:
        yield case.compare("mid.attn", weights[: len(case.mids["attn"])])
    yield case.compare("out.o", heads)
