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
    scores = probed(case.inputs["q"], case.inputs["k"], case.inputs["probe_ids"].long())
    yield case.compare("mid.saliency", scores)
    valid = torch.ones(x.shape[:3], dtype=torch.bool)
    # Their scores decide, so that near-ties do not.
    other = least(case.mids["saliency"], valid, config["unimportant_ratio"])
    ids = case.mids["unimportant_ids"].long()
    yield case.compare("mid.unimportant_ids", in_order(other, case.mids["saliency"], ids))
    # The published scale is one for all rows of a batch.
    scale = channel_scale(x, valid).amax(dim=0, keepdim=True)
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


def in_order(other: Tensor, scores: Tensor, theirs: Tensor) -> Tensor:
    """The chosen tokens in their order of rising score, equal scores as they have them."""
    count = theirs.shape[-1]
    order = scores.masked_fill(~other, torch.inf).argsort(dim=-1, stable=True)[..., :count]
    equal = scores.gather(-1, order) == scores.gather(-1, theirs)
    return torch.where(equal, theirs, order)


def _at(x: Tensor, at: Tensor) -> Tensor:
    return x.gather(2, at[..., None].expand(-1, -1, -1, x.shape[-1]))
