"""Error-free linear attention: the demonstration's projections, and the delta rule beside it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn.functional import layer_norm, linear, normalize

from attlas import ops
from attlas.contract.cases import Case, Check, adapter
from attlas.layers.linear.error_free import exact_step


@adapter("efla", mechanism="error-free-linear-attention")
def efla(case: Case) -> Iterator[Check]:
    q, k, v, beta = (case.inputs[name] for name in ("q", "k", "v", "beta"))
    params = case.params
    case.sizes(q, "batch length dim")
    # What the demonstration makes q, k, v and β of, which are given.
    case.without_effect("config.key_scale", "in.x", "param.pos_emb")
    for name in ("input", "q", "k", "v", "beta"):
        case.without_effect(f"param.{name}_proj.weight", f"param.{name}_proj.bias")

    def run(keys: Tensor, step: Tensor) -> Tensor:
        out, _ = ops.recurrence(q[:, None], keys[:, None], v[:, None], beta=step[:, None, :, 0])
        return out[:, 0]

    outs = {
        "efla": run(k, exact_step(k[:, None], beta.mT)[:, 0, :, None]),
        "deltanet": run(normalize(k, dim=-1), beta),
    }
    for name, out in outs.items():
        yield case.compare(f"out.o_{name}", out)
        if f"logits_{name}" in case.mids:
            last = layer_norm(out[:, -1], q.shape[-1:], params["norm.weight"], params["norm.bias"])
            logits = linear(last, params["classifier.weight"], params["classifier.bias"])
            yield case.compare(f"mid.logits_{name}", logits)
    if not case.mids:
        for name in ("norm", "classifier"):
            case.without_effect(f"param.{name}.weight", f"param.{name}.bias")


