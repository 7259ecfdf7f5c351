"""Linear attention: the bare recurrence of features, with its sums divided and not."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn.functional import pad

from attlas import ops
from attlas.contract.cases import Case, Check, adapter


@adapter("linear-attention", mechanism="linear-attention")
def linear_attention(case: Case) -> Iterator[Check]:
    q, k, v = (case.inputs[name] for name in "qkv")
    case.sizes(q, "batch heads length key_dim")
    state = case.inputs.get("initial_state")
    case.states(value_dim=v.shape[-1], initial_state=state is not None)
    scale, width = q.shape[-1] ** -0.5, v.shape[-1]
    for form in ("step", "chunked", "parallel"):
        for name, eps in {"o_unnormalized": None, "o_normalized": 1e-10}.items():
            if name in case.outs:
                divided = {} if eps is None else {"normalize": True, "eps": eps}
                # The sums stand beside the values, and begin at 0 whatever is remembered.
                before = state if state is None or eps is None else pad(state, (0, 1))
                out, last = ops.recurrence(
                    q, k, v, scale=scale, initial_state=before, form=form, **divided
                )  # fmt: skip
                yield case.compare(f"out.{name}", out)
        if "final_state" in case.outs and last is not None:
            yield case.compare("out.final_state", last[..., :width])
