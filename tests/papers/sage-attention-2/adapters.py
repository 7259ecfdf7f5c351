"""SageAttention: the authors' integers and scales, of blocks and of threads."""

from __future__ import annotations

from collections.abc import Iterator
from math import e, log2

import torch
from torch import Tensor

from attlas.contract.cases import Case, Check, adapter
from attlas.ops.sage_attention import TINY, Integers, quantise, sage_attention


def smoothed(case: Case) -> Tensor:
    """The keys without their mean, which is compared on the way."""
    return case.inputs["k"] - case.inputs["k"].mean(2, keepdim=True)


def sizes(case: Case) -> None:
    case.sizes(case.inputs["q"], "B heads T head_dim")
    case.sizes(case.inputs["k"], "B kv_heads T head_dim")


@adapter("sage-int8", mechanism="sage-attention-2")
def sage_int8(case: Case) -> Iterator[Check]:
    sizes(case)
    q, k, v = (case.inputs[name] for name in "qkv")
    blocks = {"q_block": case.config["BLKQ"], "k_block": case.config["BLKK"]}
    if "k_mean" in case.mids:
        yield case.compare("mid.k_mean", k.mean(2, keepdim=True))
    for name, x in (
        ("q", quantise(q * (q.shape[-1] ** -0.5 * log2(e)), 8, blocks["q_block"])),
        ("k", quantise(smoothed(case), 8, blocks["k_block"])),
    ):
        yield case.compare(f"out.{name}_int8", x.codes)
        yield case.compare(f"out.{name}_scale", x.scales)
    if "o_from_quantised_logits" in case.outs:
        out, _ = sage_attention(q, k, v, bits=8, values=None, per="block", **blocks)
        yield case.compare("out.o_from_quantised_logits", out)


@adapter("sage2-per-thread", mechanism="sage-attention-2")
def sage2_per_thread(case: Case) -> Iterator[Check]:
    sizes(case)
    q, config = case.inputs["q"], case.config
    if "k_mean" in case.mids:
        yield case.compare("mid.k_mean", case.inputs["k"].mean(2, keepdim=True))
    made = {
        "q_int8": quantise(q, 8, config["WARPQ"], groups=8),
        "q_int4": quantise(q, 4, config["WARPQ"], groups=8),
        "k_int8": quantise(smoothed(case), 8, config["WARPK"], groups=4, near=2),
        "k_int4": quantise(smoothed(case), 4, config["WARPK"], groups=4, near=2),
    }
    for name, x in made.items():
        if name not in case.outs:
            continue
        scale = f"{name.replace('_int8', '')}_scale"
        block, run = config[f"BLK{name[0].upper()}"], config[f"WARP{name[0].upper()}"]
        yield case.compare(f"out.{name}", x.codes)
        yield case.compare(f"out.{scale}", padded(x, block, run, 8 if name[0] == "q" else 4))


def padded(x: Integers, block: int, run: int, groups: int) -> Tensor:
    """The scales, with those that stand for runs of the last block that hold no token."""
    runs = -(-x.codes.shape[2] // block) * (block // run)
    missing = runs * groups - x.scales.shape[2]
    return torch.nn.functional.pad(x.scales, (0, missing), value=TINY)
