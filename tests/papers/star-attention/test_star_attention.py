"""star-attention: hosts merged are attention over all they hold, and one pass is what all hosts do."""

import pytest
import torch

import tiny_models
from attlas import masks, ops
from attlas.attach import attach
from attlas.ops.star_attention import star_attention
from attlas.parts.select.star import StarPrefill


@pytest.mark.parametrize("hosts", [1, 3, 4, 50])
@pytest.mark.parametrize("context", [0, 5, 24])
def test_star_attention_is_attention_over_all_caches(hosts, context):
    q, k, v = (torch.randn(2, n, t, 8) for n, t in ((4, 6), (2, context + 6), (2, context + 6)))
    out, lse = star_attention(q, k, v, hosts=hosts)
    wanted, its = ops.attend(q, k, v, mask=masks.causal, return_lse=True)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse, its, atol=1e-5, rtol=0)


def test_star_attention_with_one_block_is_full_attention():
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(2, 30)
    with torch.no_grad():
        plain = model(ids).logits
        with attach(model, StarPrefill(hosts=1, question=4)):
            torch.testing.assert_close(model(ids).logits, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("anchor", [True, False])
def test_one_pass_is_what_each_host_does(anchor):
    """A host encodes the first block and its own, at their places, and keeps its own."""
    model, ids = tiny_models.decoder("llama"), tiny_models.prompt(1, 24)
    with torch.no_grad(), attach(model, StarPrefill(hosts=3, anchor=anchor)):
        whole = model(ids).logits
    for host in range(1, 3):
        at = list(range(8)) * anchor + list(range(8 * host, 8 * host + 8))
        with torch.no_grad():
            alone = model(ids[:, at], position_ids=torch.tensor([at])).logits[:, -8:]
        torch.testing.assert_close(whole[:, 8 * host : 8 * host + 8], alone, atol=1e-4, rtol=1e-4)


def test_fewer_keys_than_queries_are_refused():
    x = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match="k must hold"):
        star_attention(x, x[:, :, :2], x[:, :, :2])
    with pytest.raises(ValueError, match="hosts"):
        star_attention(x, x, x, hosts=0)
