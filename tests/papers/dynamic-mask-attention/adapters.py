"""Dynamic mask attention: the kernels' prototype on given q, k and v, and the authors' model's layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

import attlas
from attlas import ops
from attlas.contract.cases import Case, Check, adapter, load_weights
from reference.rope import rope_of


@adapter("dma", mechanism="dynamic-mask-attention")
def prototype(case: Case) -> Iterator[Check]:
    config, (q, k, v) = case.config, (case.inputs[name] for name in "qkv")
    case.sizes(q, "B heads T head_dim")
    case.sizes(k, "B kv_heads T head_dim")
    # Tokens that hold their query, key and value side by side.
    sides = [x.transpose(1, 2).flatten(2) for x in (q, k, v)]
    x = torch.cat(sides, dim=-1)
    layer = attlas.make(
        "dynamic-mask-attention", dim=x.shape[-1], heads=q.shape[1], kv_heads=k.shape[1],
        head_dim=q.shape[-1], causal=config["causal"], keep=config["window_size"], form="linear",
    )  # fmt: skip
    parts = torch.eye(x.shape[-1]).split([side.shape[-1] for side in sides])
    own = {f"{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)}
    load_weights(layer, {**own, **case.params, "o_proj.weight": layer.o_proj.weight})
    *prepared, inputs = layer.prepare(x)
    if "bias" in case.mids:
        yield case.compare("mid.bias", layer.importance(inputs))
    if "mask" in case.mids:
        pairs = inputs.visible(*prepared[:2])
        full = torch.ones(*q.shape[:3], k.shape[2], dtype=torch.bool)
        pairs = full if pairs is None else pairs.expand_as(full)
        wanted = case.mids["mask"]
        yield case.compare("mid.mask", _of_groups(pairs, k.shape[1])[: len(wanted)].to(wanted.dtype))
    yield case.compare("out.o", layer.attend(*prepared, inputs))


@adapter("dma-doge", mechanism="dynamic-mask-attention")
def doge(case: Case) -> Iterator[Check]:
    config, x = case.config, case.inputs["x"]
    case.sizes(x, "B T dim")
    head_dim = case.inputs["cos"].shape[-1]
    rope = rope_of(config["rope"], head_dim, interleaved=False)
    heads, kv_heads = config["heads"], config["kv_heads"]
    layer = attlas.make(
        "dynamic-mask-attention", dim=config["dim"], heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, causal=config.get("causal", True), keep=config["keep_window_size"],
        bias=any(name.endswith("bias") for name in case.params),
    )  # fmt: skip
    norms = [case.params[f"{name}_norm.weight"] for name in "qk"]
    load_weights(layer, {n: w for n, w in case.params.items() if "_norm" not in n})
    q, k, v, inputs = layer.prepare(x)
    eps = config.get("rms_norm_eps", 1e-6)
    q, k = (rms_norm(t, t.shape[-1:], w, eps) for t, w in zip((q, k), norms, strict=True))
    if rope is not None:
        for name, waves in zip(("cos", "sin"), rope.waves(q, inputs.positions), strict=True):
            yield case.compare(f"in.{name}", torch.cat((waves[0], waves[0]), dim=-1))
        q, k = rope.rotate_both(q, k, inputs.positions, inputs.positions)
    if "attn" in case.mids:
        yield case.compare("mid.attn", layer.weigh(q, k, inputs)[: len(case.mids["attn"])])
    yield case.compare("out.o", layer.output(layer.attend(q, k, v, inputs), inputs))


def _of_groups(pairs: Tensor, groups: int) -> Tensor:
    """What all heads of a group see alike."""
    first = pairs[:, :: pairs.shape[1] // groups]
    assert torch.equal(ops.repeated(first, pairs.shape[1]), pairs)
    return first
