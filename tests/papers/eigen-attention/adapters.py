"""How eigen attention's published calibration, folding and cache map to ours."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from attlas.cache.folding import fold
from attlas.contract.cases import Case, Check, adapter, compare
from attlas.ops.decode import decode
from attlas.parts.quantize.eigen_attention import Subspaces
from attlas.storage.low_rank import Bases, LowRankBody
from attlas.storage.rotary import Rotary, Rotation
from reference.policies import prompt_call


def heads_of(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """[batch, heads, tokens, dim] of a projection."""
    return (x @ weight.mT).unflatten(-1, (heads, -1)).transpose(1, 2)


@adapter("eigen-attention", mechanism="eigen-attention")
def eigen_attention(case: Case) -> Iterator[Check]:
    """Bases by calibration, folded weights, and the output of both forms: folded, and as a cache."""
    config, weights = case.config, [case.params[f"{n}_proj.weight"] for n in "qkvo"]
    heads, kv_heads, dim = (config[n] for n in ("heads", "kv_heads", "head_dim"))
    theta = re.search(r"theta\s*([\d.e+]+)", str(config.get("rope", "")))
    rotary = Rotary.plain(dim, float(theta.group(1)) if theta else 10000.0)
    if str(config.get("rope", "")).lower() in ("", "none", "false"):
        rotary = None
    counts = (heads, kv_heads, kv_heads)
    case.sizes(case.inputs["x"], "B T dim")

    def projected(x: Tensor) -> list[Tensor]:
        q, k, v = (heads_of(x, w, n) for w, n in zip(weights[:3], counts, strict=True))
        if rotary is not None:
            at = torch.arange(x.shape[1]).expand(x.shape[0], -1)
            q, k = rotary.rotate(q, at), rotary.rotate(k, at)
        return [q, k, v]

    subspaces = Subspaces()
    subspaces.layers, subspaces.rotations = (0,), {0: None}
    if rotary is not None:
        model = torch.nn.Module()
        model.register_buffer("frequencies", rotary.inverse)
        subspaces.rotations[0] = Rotation(model, "frequencies", "scale")
    subspaces.observe(prompt_call(*projected(case.inputs["calibration"][None]), dim**-0.5))
    found = subspaces.tensors()
    ours = [found["0.kq.basis"].float(), found["0.v.basis"].float()]
    theirs = [case.params["basis_kq"].reshape(-1, dim, dim), case.params["basis_v"]]
    for name, a, b in zip(("kq", "v"), ours, theirs, strict=True):
        spectrum = found[f"0.{name}.energy"].sqrt()
        spectrum = spectrum / spectrum.sum(dim=-1, keepdim=True)
        if f"spectrum_{name}" in case.mids:
            theirs_of = case.mids[f"spectrum_{name}"]
            yield case.compare(f"mid.spectrum_{name}", spectrum.reshape(theirs_of.shape))
        same_sign = (a * b).sum(dim=-2, keepdim=True).sign()
        yield compare(f"param.basis_{name}", a * same_sign, b, case.atol, case.rtol)

    ranks = config["rank_kq_per_head"], config["rank_v_per_head"]
    cut = [b[..., :r] for b, r in zip(theirs, ranks, strict=True)]
    published = fold(*weights, *cut, rotary)
    names = ("k_proj_low.weight", "v_proj_low.weight", "o_proj_up.weight")
    for name, ours_of in zip(names, (published.k, published.v, published.o), strict=True):
        if name in case.mids:
            yield case.compare(f"mid.{name}", ours_of)
    x = case.inputs["x"]
    yield case.compare("out.o", published(x))
    cut = [b[..., :r].contiguous() for b, r in zip(ours, ranks, strict=True)]
    folded = fold(*weights, *cut, rotary)
    yield case.compare("out.o", folded(x))._replace(name="out.o, bases of our calibration")

    q, k, v = projected(x)
    bases = Bases(cut[0], cut[1], rotary)
    at = torch.arange(x.shape[1]).expand(x.shape[0], 1, -1)
    body = LowRankBody(*bases.encode(k, v, at), bases, None if rotary is None else at)
    out = decode(q[:, :, -1:], [body.segment()], scale=dim**-0.5)[0]
    out = out.transpose(1, 2).flatten(2) @ weights[3].mT
    yield compare(
        "out.o, last token, of a cache", out, case.outs["o"][:, -1:], case.atol, case.rtol
    )
