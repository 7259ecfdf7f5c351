"""moba: every query reads its own block and the best earlier ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attlas
from attlas import masks
from attlas.layers.sparse.moba import MoBA


def layer(**options: object) -> MoBA:
    made = attlas.make("moba", **{"dim": 32, "heads": 4, "kv_heads": 2, "block": 4, "topk": 2, **options})
    return made.double()


def by_hand(q: Tensor, k: Tensor, block: int, topk: int) -> Tensor:
    """Which keys each query reads, by loops: [batch, heads, tokens, tokens]."""
    batch, heads, tokens, _ = q.shape
    read = torch.zeros(batch, heads, tokens, tokens, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            keys = k[b, h * k.shape[1] // heads]
            for t in range(tokens):
                own = t // block
                means = [keys[n * block : (n + 1) * block].mean(0) for n in range(own)]
                best = sorted(range(own), key=lambda n: -(q[b, h, t] @ means[n]).item())[: topk - 1]
                for n in (*best, own):
                    read[b, h, t, n * block : min((n + 1) * block, t + 1)] = True
    return read


@pytest.mark.parametrize("tokens", [3, 16, 31])
@pytest.mark.parametrize("topk", [1, 2, 5])
def test_moba_reads_the_blocks_of_its_definition(tokens: int, topk: int) -> None:
    mixer = layer(topk=topk, position="rope")
    x = torch.randn(2, tokens, 32, dtype=torch.float64)
    q, k, _, inputs = mixer.prepare(x)
    assert torch.equal(inputs.visible(q, k), by_hand(q, k, 4, topk))


def test_moba_of_all_blocks_is_full_causal_attention() -> None:
    x = torch.randn(2, 50, 32, dtype=torch.float64)
    mixer = layer(topk=13, position="rope")
    plain = attlas.Attention(32, 4, kv_heads=2, causal=True, position="rope").double()
    plain.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(x), plain(x), rtol=0, atol=1e-6)


def test_moba_is_switched_to_full_attention_and_back_by_its_weights_alone() -> None:
    x = torch.randn(1, 40, 32, dtype=torch.float64)
    mixer = layer()
    plain = attlas.Attention(32, 4, kv_heads=2, causal=True).double()
    plain.load_state_dict(mixer.state_dict())
    sparse = mixer(x)
    mixer.full = True
    torch.testing.assert_close(mixer(x), plain(x))
    mixer.full = False
    assert torch.equal(mixer(x), sparse)
    assert not torch.allclose(sparse, plain(x))


def test_moba_future_tokens_never_leak() -> None:
    x = torch.randn(2, 37, 32, dtype=torch.float64)
    other = x.clone()
    other[:, 21:] = torch.randn(2, 16, 32, dtype=torch.float64)
    mixer = layer(position="rope")
    assert torch.equal(mixer(x)[:, :21], mixer(other)[:, :21])


def test_moba_reads_lists_where_they_pay_and_gives_what_all_pairs_give() -> None:
    """512 tokens go through lists of blocks; the same pattern as booleans is the plain route."""
    x = torch.randn(1, 512, 32, dtype=torch.float64, requires_grad=True)
    mixer = layer(block=32, topk=3)
    q, k, v, inputs = mixer.prepare(x)
    assert isinstance(inputs.pairs.left, masks.Pages)
    listed = mixer.attend(q, k, v, inputs)
    inputs.pairs = inputs.visible(q, k)
    plain = mixer.attend(q, k, v, inputs)
    torch.testing.assert_close(listed, plain, rtol=1e-9, atol=1e-9)
    ours, theirs = (
        torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (listed, plain)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_moba_cuts_blocks_by_a_rows_own_tokens() -> None:
    """With padding in the middle of a row as well."""
    mixer, x = layer(position="rope"), torch.randn(2, 30, 32, dtype=torch.float64)
    valid = torch.rand(2, 30) > 0.3
    padded = mixer(x, mask=valid)
    for row in range(2):
        alone = mixer(x[row : row + 1, valid[row]])
        torch.testing.assert_close(padded[row, valid[row]], alone[0])


def test_moba_refuses_other_masks_and_packed_positions() -> None:
    x = torch.randn(1, 8, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match="mask"):
        layer()(x, mask=masks.document(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])))
    with pytest.raises(ValueError, match="positions"):
        layer(position="rope")(x, positions=torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]))
    with pytest.raises(ValueError, match="topk"):
        layer(topk=0)
