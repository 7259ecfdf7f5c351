"""How ZipCache's published functions map to ours."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from attlas.cache.mixed import parted
from attlas.contract.cases import Case, Check, adapter
from attlas.parts.quantize.zipcache import channel_scale, least, saliency
from attlas.storage.layer import LayerState, StoredLayer, Taken
from attlas.storage.shared import encode_rows


@adapter("zipcache", mechanism="zipcache")
def zipcache(case: Case) -> Iterator[Check]:
    """Saliency from given probes, then channel-separable rows of merged heads."""
    config, x = case.config, case.inputs["x"]
    case.sizes(x, "B heads T head_dim")
    scores = probed(case.inputs["q"], case.inputs["k"], case.inputs["probe_ids"].long())
    if "saliency" in case.mids:
        yield case.compare("mid.saliency", scores)
        scores = case.mids["saliency"]  # so that near-ties do not decide
    valid = torch.ones(x.shape[:3], dtype=torch.bool)
    other = least(scores, valid, config["unimportant_ratio"])
    ids = scores.masked_fill(~other, torch.inf).argsort(dim=-1, stable=True)
    ids = ids[..., : int(other[0, 0].sum())]
    if "unimportant_ids" in case.mids:
        theirs = case.mids["unimportant_ids"].long()
        ids = torch.where(scores.gather(-1, ids) == scores.gather(-1, theirs), theirs, ids)
        yield case.compare("mid.unimportant_ids", ids)
    # The published scale is one for all rows of a batch.
    scale = channel_scale(x, valid).amax(dim=0, keepdim=True)
    if "channel_scale" in case.mids:
        yield case.compare("mid.channel_scale", rearrange(scale, "b h 1 d -> b 1 (h d)"))
    channel = scale.expand(x.shape[0], -1, -1, -1)
    taken = Taken(x, x, None, 0)
    mixed = torch.zeros_like(x)
    for member, bits in ((~other, config["bits_salient"]), (other, config["bits_other"])):
        part = parted(taken, member)
        if part is None:
            continue
        at = part.index.long()
        if member is other:  # published rows of unimportant tokens go by rank of score
            at = ids
        coded = encode_rows(_at(x, at), bits, channel=channel, meta=torch.float32)
        mixed = mixed.scatter(2, at[..., None].expand(-1, -1, -1, x.shape[-1]), coded.read())
    yield case.compare("out.mixed_dequantized", mixed)
    single = encode_rows(x, config["bits_salient"], channel=channel, meta=torch.float32)
    yield case.compare("out.single_dequantized", single.read())


def probed(q: Tensor, k: Tensor, probes: Tensor) -> Tensor:
    """Saliency of all keys from some queries, as the part measures it."""
    batch = q.shape[0]
    state = LayerState(0, (0,), scaling=q.shape[-1] ** -0.5)
    state.tensors = {"queries": q[:, :, probes], "columns": probes.expand(batch, -1)}
    layer = StoredLayer({"ZipCache": state})
    layer.update(k, k)
    return saliency(layer, state, layer.rows())


def _at(x: Tensor, at: Tensor) -> Tensor:
    return x.gather(2, at[..., None].expand(-1, -1, -1, x.shape[-1]))
