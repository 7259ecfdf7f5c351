"""How the merge over hosts of Star-Attention's published code maps to ours."""

from __future__ import annotations

from collections.abc import Iterator

from attlas.contract.cases import Case, Check, adapter
from attlas.ops.star_attention import star_attention


@adapter("star-merge", mechanism="star-attention")
def star_merge(case: Case) -> Iterator[Check]:
    """Hosts of equal blocks; the last holds the queries' keys."""
    config, (q, k, v) = case.config, (case.inputs[name] for name in "qkv")
    case.sizes(q, "B heads query_tokens head_dim")
    case.states(context=k.shape[2] - q.shape[2])
    out, lse = star_attention(q, k, v, hosts=config["hosts"])
    yield case.compare("out.o", out)
    yield case.compare("out.lse", lse)
