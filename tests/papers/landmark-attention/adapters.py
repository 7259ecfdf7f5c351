"""Landmark attention: there, landmarks are told by a mask; here, by counting, and both must agree."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import attlas
from attlas.contract.cases import Case, Check, adapter
from attlas.layers.sparse.landmark import grouped_softmax


def _scores(case: Case) -> Tensor:
    q, k = case.inputs["q"], case.inputs["k"]
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    scores: Tensor = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(hidden, -torch.inf)


@adapter("landmark-attention", mechanism="landmark-attention")
def landmark_attention(case: Case) -> Iterator[Check]:
    q, marked = case.inputs["q"], case.inputs["is_landmark"].bool()
    case.sizes(q, "batch heads length head_dim")
    case.without_effect("config.seed")
    each = case.config["block"]  # tokens before a landmark
    scores, section = _scores(case), (marked.cumsum(-1) - marked.long())[:, None]
    rows, columns = section[:, :, :, None], section[:, :, None]
    landmark = marked[:, None, None]
    weights = grouped_softmax(scores, rows, columns, landmark, int(marked.sum(-1).max()) + 1)
    if "probabilities" in case.mids:
        yield case.compare("mid.probabilities", weights)
    yield case.compare("out.o", weights @ case.inputs["v"])
    own = (rows == columns) & (scores[:, :1] > -torch.inf)
    if "last_section_mask" in case.mids:
        theirs = case.mids["last_section_mask"].bool()
        told = own[:, 0] & (theirs | ~marked[:, None])  # its own landmark is in it there, and hidden
        yield case.compare("mid.last_section_mask", told.to(case.mids["last_section_mask"].dtype))
    regular = torch.arange(q.shape[2]) % (each + 1) == each
    if bool((marked == regular).all()):
        layer = attlas.make(
            "landmark-attention", dim=q.shape[1] * q.shape[3], heads=q.shape[1], block=each + 1,
            head_dim=q.shape[3],
        ).to(q.dtype).eval()  # fmt: skip
        *_, inputs = layer.prepare(q.new_zeros(len(q), q.shape[2], layer.dim))
        yield case.compare("out.o", layer.attend(q, case.inputs["k"], case.inputs["v"], inputs))


@adapter("landmark-softmax", mechanism="landmark-attention")
def landmark_softmax(case: Case) -> Iterator[Check]:
    """Its masks count the landmark of a query's own block as a token."""
    q, marked = case.inputs["q"], case.inputs["is_landmark"].bool()
    case.sizes(q, "B heads T head_dim")
    case.states(block=case.config["mem_freq"] + 1)
    at = torch.arange(q.shape[2]) // case.config["block"]
    rows, columns = at[None, None, :, None], at[None, None, None]
    causal = torch.ones(len(at), len(at), dtype=torch.bool).tril()
    for name, ours in {
        "in.is_mem": marked & (columns < rows)[0, 0],
        "in.last_section_mask": (columns == rows)[0, 0],
    }.items():
        theirs = case.inputs[name[3:]]
        wrong = (ours & causal) != (theirs.bool() & causal)
        yield Check(name, float(wrong.sum()), 0.0)
    weights = grouped_softmax(
        _scores(case), rows, columns, marked[None, None, None], int(at[-1]) + 1, own_landmark=True
    )  # fmt: skip
    if "attn" in case.mids:
        yield case.compare("mid.attn", weights)
    yield case.compare("out.o", weights @ case.inputs["v"])
