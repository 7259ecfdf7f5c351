"""Native sparse attention: two published programs, of which one gives queries, keys, values and gates."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad, rms_norm

import attlas
from attlas import ops
from attlas.contract.cases import Case, Check, adapter, load_weights
from attlas.layers.sparse.native_sparse import NativeSparse
from attlas.positions import RoPE

MECHANISM = "native-sparse-attention"


@adapter("nsa-fla", mechanism=MECHANISM)
def nsa_fla(case: Case) -> Iterator[Check]:
    """Blocks are compressed to their means, and selected as they are compressed."""
    q, k, v = (case.inputs[name] for name in "qkv")
    case.sizes(q, "B query_heads T head_dim")
    case.sizes(k, "B kv_heads T head_dim")
    size, window = case.config["block_size"], case.config["window_size"]
    names = ["g_cmp", "g_slc"] + (["g_swa"] if window else [])
    layer = attlas.make(
        MECHANISM, dim=q.shape[1] * q.shape[3], heads=q.shape[1], kv_heads=k.shape[1],
        head_dim=q.shape[3], block=size, stride=size, selected=size, topk=case.config["block_counts"],
        window=window or None, compression="mean",
    ).to(q.dtype).eval()  # fmt: skip
    *_, inputs = layer.prepare(q.new_zeros(len(q), q.shape[2], layer.dim))
    inputs.notes["gates"] = torch.stack([case.inputs[name] for name in names], dim=-1)
    yield case.compare("out.o", layer.attend(q, k, v, inputs))
    yield case.compare("out.o", layer.aggregate(layer.weigh(q, k, inputs), v, inputs))
    tokens = layer.blocks(q, k, inputs, 1)
    coarse, chosen = layer.coarse(q, *layer.summaries(k, v, inputs), tokens)
    if "o_cmp" in case.mids:
        yield case.compare("mid.o_cmp", coarse)
    if "selected_blocks" in case.mids:
        yield case.compare("mid.selected_blocks", read(chosen, -(-q.shape[2] // size)))


def read(chosen: Tensor, count: int) -> Tensor:
    """Lists as ones at the blocks that are read."""
    table = chosen.new_zeros(*chosen.shape[:-1], count + 1)
    return table.scatter(-1, chosen.long() % (count + 1), 1)[..., :count]


@adapter("nsa-lucidrains", mechanism=MECHANISM)
def nsa_lucidrains(case: Case) -> Iterator[Check]:
    """A layer that differs in what is met by compression and how blocks are chosen: queries and keys are
    not rotated there, trained memories stand before the compressed blocks, and blocks go by means of
    scores. Its other parts are ours."""
    config, params, x = case.config, case.params, case.inputs["x"]
    case.sizes(x, "B T dim")
    case.states(causal=True, num_compressed_mem_kv=params["compress_mem_kv"].shape[2])
    heads, kv_heads, width = config["heads"], config["kv_heads"], config["dim_head"]
    layer = attlas.make(
        MECHANISM, dim=config["dim"], heads=heads, kv_heads=kv_heads, head_dim=width,
        position=RoPE(width, interleaved=True), block=config["compress_block_size"],
        stride=config["compress_block_sliding_stride"], selected=config["selection_block_size"],
        topk=config["num_selected_blocks"] + 1, first=0, recent=1,
        window=config["sliding_window_size"] + 1, hidden=params["k_compress.1.weight"].shape[0],
    )  # fmt: skip
    parts = params["to_qkv.weight"].split([heads * width, kv_heads * width, kv_heads * width])
    weights = {f"{name}_proj.weight": part for name, part in zip("qkv", parts, strict=True)}
    weights["o_proj.weight"] = params["combine_heads.weight"]
    for kind in ("weight", "bias"):
        weights[f"gate_proj.{kind}"] = params[f"to_strategy_combine.0.{kind}"]
    for side in "kv":
        weights[f"{side}_compress.places"] = params[f"{side}_intrablock_positions"]
        for kind in ("weight", "bias"):
            weights[f"{side}_compress.enter.{kind}"] = params[f"{side}_compress.1.{kind}"]
            weights[f"{side}_compress.leave.{kind}"] = params[f"{side}_compress.3.{kind}"]
    load_weights(layer, weights)
    layer.position_encoding.frequencies.copy_(params["rotary_emb.freqs"])
    x = rms_norm(x, x.shape[-1:], params["norm.weight"], torch.finfo(torch.float32).eps)
    q, k, v, inputs = layer.prepare(x)
    plain_q, plain_k, _ = layer.project(inputs)
    coarse, scores = met(layer, plain_q, plain_k, v, params["compress_mem_kv"])
    chosen = layer.choose(scores, (torch.arange(x.shape[1]) // layer.selected)[None])
    outs = coarse, layer.read(q, k, v, chosen, inputs), layer.near(q, k, v, inputs)
    gates = inputs.notes["gates"].split(1, dim=-1)
    summed = sum(gate * out for gate, out in zip(gates, outs, strict=True))
    yield case.compare("out.o", layer.output(summed, inputs))


def met(
    layer: NativeSparse, q: Tensor, k: Tensor, v: Tensor, memories: Tensor
) -> tuple[Tensor, Tensor]:
    """What memories and compressed blocks give, and the score of each block that may be selected."""
    tokens, stride = q.shape[2], layer.stride
    whole, before = tokens // stride * stride, layer.block - stride
    k_bar, v_bar = (
        compress(pad(side[:, :, :whole], (0, 0, before, 0)))
        for side, compress in ((k, layer.k_compress), (v, layer.v_compress))
    )
    at = torch.arange(tokens)[:, None]
    seen = torch.arange(k_bar.shape[2]) * stride + stride - 1 < at
    known = pad(seen, (memories.shape[2], 0), value=True)
    every_k, every_v = (
        torch.cat((memory.expand(len(q), -1, -1, -1), side), dim=2)
        for memory, side in zip(memories, (k_bar, v_bar), strict=True)
    )
    coarse = ops.attend(q, every_k, every_v, mask=known[None, None])
    scores = (ops.grouped_product(q, k_bar.mT) * layer.scale).masked_fill(~seen, -1e30)
    scores = scores.unflatten(1, (k.shape[1], -1)).mean(2)
    if (each := layer.selected // stride) > 1:
        blocks = scores.shape[-1] // each
        scores = scores[..., : blocks * each].unflatten(-1, (blocks, each)).mean(-1)
        scores = scores.masked_fill(at // layer.selected == torch.arange(blocks), -1e30)
    shares = pad(scores, (1, 0), value=-1e3).softmax(-1)[..., 1:]
    shares = shares.masked_fill(shares <= 1e-10, -torch.inf)
    count = -(-tokens // layer.selected)
    return coarse, pad(shares, (0, count - shares.shape[-1]), value=-torch.inf)
