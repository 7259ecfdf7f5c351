"""sage-prefill: a prompt is attended to by the op, and decoding by the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import tiny_models
from attlas import masks
from attlas.attach import attach
from attlas.attach.thinned import Text
from attlas.ops.delta import attend_with_sinks
from attlas.ops.sage_attention import sage_attention
from attlas.parts.evict.snapkv import SnapKV
from attlas.parts.select.sage import SagePrefill


def text(queries: int, keys: int, heads: int = 4, kv_heads: int = 2) -> Text:
    q, k, v = (torch.randn(2, n, t, 8) for n, t in ((heads, queries), (kv_heads, keys), (kv_heads, keys)))
    return Text(0, q, k + 3, v, scale=8**-0.5)


@pytest.mark.parametrize(("queries", "keys"), [(37, 37), (9, 40)])
@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"per": "block", "values": "fp16"}])
def test_sage_attention_2_of_a_prompt_is_the_op(options: Any, queries: int, keys: int) -> None:
    of = text(queries, keys)
    part = SagePrefill(**options)
    found = part.attended(of)
    wanted, _ = sage_attention(of.q, of.k, of.v, mask=masks.causal, **{"bits": 8, **options})
    assert found.equal(wanted)
    assert part.density[0].tolist() == [1.0] * 4


def test_sage_attention_2_of_a_prompt_honours_sinks_and_what_a_model_hides() -> None:
    of = text(37, 40)
    seen = torch.rand(2, 1, 37, 40) > 0.3
    of = replace(of, sinks=torch.randn(4), seen=seen | torch.eye(37, 40, dtype=torch.bool))
    wanted = attend_with_sinks(
        of.q, of.k, of.v, mask=masks.dense(masks.causal, 37, 40) & of.seen, score_mod=None,
        scale=of.scale, sinks=of.sinks,
    )  # fmt: skip
    torch.testing.assert_close(SagePrefill(bits=None, values=None).attended(of), wanted)
    assert torch.cosine_similarity(SagePrefill().attended(of), wanted, dim=-1).mean() > 0.999
    with pytest.raises(ValueError, match="changed scores"):
        SagePrefill().attended(replace(of, score_mod=lambda s, *_: s))


def test_sage_attention_2_of_a_prompt_stands_beside_a_cache_that_drops_tokens() -> None:
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(tokens=40)
    with torch.no_grad():
        plain = model(ids).logits
        with attach(model, SagePrefill()):
            near = model(ids).logits
    assert not near.equal(plain)
    assert torch.cosine_similarity(near, plain, dim=-1).mean() > 0.99
    with attach(model, SagePrefill(), SnapKV(keep=0.5, window=4)):
        together = tiny_models.greedy(model, ids)
    with attach(model, SagePrefill(bits=None, values=None), SnapKV(keep=0.5, window=4)):
        exact = tiny_models.greedy(model, ids)
    with attach(model, SnapKV(keep=0.5, window=4)):
        assert tiny_models.greedy(model, ids) == exact
    assert [len(row) for row in together] == [len(row) for row in exact]
