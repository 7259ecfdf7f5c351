"""How published patterns of pairs map to the mask algebra."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

import attlas
from attlas import masks, ops
from attlas.contract.cases import Case, Check, adapter
from attlas.masks import Mask
from attlas.positions import ScoreMod, additive


@adapter("bigbird-block-sparse", mechanism="bigbird-mask")
def bigbird_evaluation(case: Case) -> Iterator[Check]:
    """In evaluation the published layer draws no blocks: block 0 stands in for each of them."""
    config, size = case.config, case.config["block_size"]
    last = case.inputs["x"].shape[1] // size - 1
    extra = math.log1p(config["num_random_blocks"])

    @additive
    def block_0_again(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        middle = (q >= size) & (q < last * size)
        return score + extra * (middle & (kv < size)).to(score.dtype)

    mask = _pattern(case, random=0)
    valid = case.inputs["attention_mask"].bool()
    yield case.compare("out.o", _attend(case, mask, block_0_again))
    if "visible" in case.mids:
        tokens = valid.shape[1]
        ours = masks.dense(mask & masks.padding(valid), tokens, tokens)[0]
        queries = valid[0][:, None]  # the published rows of padded queries are of no use
        theirs = case.mids["visible"].bool() & queries
        yield Check("mid.visible", float(((ours & queries) != theirs).sum()), 0.0)


@adapter("bigbird-block-sparse-train", mechanism="bigbird-mask")
def bigbird_training(case: Case) -> Iterator[Check]:
    """In training it draws random blocks, of which the case gives the table for its first row."""
    size, random = case.config["block_size"], case.config["num_random_blocks"]
    drawn = case.mids["block_mask"].bool()
    valid = case.inputs["attention_mask"].bool()
    padded = ~valid.view(len(valid), -1, size).any(-1)
    mask = masks.blocks(masks.table(drawn), size)
    # Blocks that padding hides in the first row are not told; rows where they are read are left out.
    told = ~(padded[0] & ~padded).any(-1)
    out = _attend(case, mask, None)
    theirs = case.outs["o"].clone()
    theirs[~told] = out[~told]
    case.outs["o"] = theirs
    yield case.compare("out.o", out)
    if not padded[0].any():
        count = drawn.shape[-1]
        ours = (
            masks.dense(_pattern(case, random).inner, count, count)
            .sum(-1)
            .expand(1, *drawn.shape[:2])
        )
        yield Check("mid.blocks-a-row", float((ours[0] - drawn.sum(-1)).abs().max()), 0.0)


def _pattern(case: Case, random: int) -> Mask:
    mask = attlas.make(
        "bigbird-mask", length=case.inputs["x"].shape[1], heads=case.config["heads"],
        size=case.config["block_size"], random=random, seed=case.config.get("seed", 0),
    )  # fmt: skip
    assert isinstance(mask, Mask)
    return mask


def _attend(case: Case, mask: Mask, score_mod: ScoreMod | None) -> Tensor:
    x, valid = case.inputs["x"], case.inputs["attention_mask"].bool()
    config = case.config
    case.sizes(x, "B T _")
    case.states(num_blocks=x.shape[1] // config["block_size"])
    case.states(head_dim=x.shape[2] // config["heads"])

    def projected(name: str) -> Tensor:
        weight, bias = case.params[f"{name}.weight"], case.params.get(f"{name}.bias")
        y = torch.nn.functional.linear(x, weight, bias)
        return rearrange(y, "b t (h d) -> b h t d", h=case.config["heads"])

    heads = ops.attend(
        projected("query"), projected("key"), projected("value"),
        mask=mask & masks.padding(valid), score_mod=score_mod,
    )  # fmt: skip
    return rearrange(heads, "b h t d -> b t (h d)") * valid[..., None]
