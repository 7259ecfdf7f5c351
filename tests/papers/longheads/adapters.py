"""How LongHeads' published layer maps to ours."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from attlas import masks, ops
from attlas.attach.call import Call, ForwardPass
from attlas.cache.chunks import chunk_summaries
from attlas.contract.cases import Case, Check, adapter
from attlas.parts.select.longheads import LongHeads
from attlas.storage.layer import LayerState, StoredLayer
from attlas.storage.rotary import Rotary


@adapter("longheads", mechanism="longheads")
def longheads(case: Case) -> Iterator[Check]:
    """One layer's prompt: chunk summaries, and the heads' outputs behind the output projection."""
    config, x = case.config, case.inputs["x"]
    size, dim = config["window_size"], config["head_dim"]
    batch, tokens, _ = x.shape
    case.states(B=batch, T=tokens, heads=case.params["q_proj.weight"].shape[0] // dim)

    def heads(name: str) -> Tensor:
        return (x @ case.params[f"{name}_proj.weight"].T).unflatten(2, (-1, dim)).transpose(1, 2)

    theta = float(str(config.get("rope", "theta 10000")).rsplit(maxsplit=1)[-1])
    rotary, positions = Rotary.plain(dim, theta), torch.arange(tokens).expand(batch, -1)
    q, k = (rotary.rotate(heads(name), positions) for name in "qk")
    part = LongHeads(
        size, config["atten_length"], begin=config["begin_selective_length"], attend_self=False
    )
    state = LayerState(0, (0,), rotary=rotary, scaling=dim**-0.5)
    layer = StoredLayer({part.name: state})
    layer.update(k, heads("v"))
    step = ForwardPass(length=tokens, positions=positions)
    call = Call(
        0, nn.Identity(), q, k, heads("v"), dim**-0.5, None, step, cache_layer=layer, is_causal=True
    )
    found = part.attend(call)
    if found is None:  # no token beyond the one from which chunks are chosen
        found = ops.attend(q, k, heads("v"), mask=masks.causal).transpose(1, 2)
    yield case.compare("out.o", found.flatten(2) @ case.params["o_proj.weight"].T)
    whole = tokens // size * size
    keys, mean = chunk_summaries(
        q[:, :, :whole], k[:, :, :whole], heads("v")[:, :, :whole], positions[:, :whole],
        size, dim**-0.5, rotary,
    )  # fmt: skip
    for name, ours in {"chunk_key": keys, "chunk_mean": mean}.items():
        if name in case.mids:  # the published code leaves the last chunk out
            yield case.compare(f"mid.{name}", ours[:, :, : case.mids[name].shape[2]])
