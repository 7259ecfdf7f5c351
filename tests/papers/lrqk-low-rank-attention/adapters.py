"""How LRQK's published functions map to ours."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from attlas.attach.call import Call, ForwardPass
from attlas.cache.factors import decoded, factorised
from attlas.cache.summaries import best_portion
from attlas.contract.cases import Case, Check, adapter
from attlas.parts.select.lrqk import LRQK
from attlas.storage.layer import LayerState


@adapter("lrqk", mechanism="lrqk-low-rank-attention")
def lrqk(case: Case) -> Iterator[Check]:
    """The factors of a prompt, the codes of one more token, and the tokens of largest proxy score."""
    config = case.config
    queries, keys, q, k = (case.inputs[name] for name in ("Q", "K", "q", "k"))
    heads = queries.shape[1]
    case.sizes(queries, "B heads T head_dim")
    case.states(dtype=str(queries.dtype).removeprefix("torch."), tol=(0, 0.0))
    part = LRQK(
        tokens=config["topk"], rank=config["rank"], sweeps=config["prefill_iterations"],
        refinements=config["decode_iterations"],
    )  # fmt: skip
    state = LayerState(0, (0,))
    step = ForwardPass(length=queries.shape[2])
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
    yield case.compare("out.topk_indices", best_portion(scores, part.portion))
