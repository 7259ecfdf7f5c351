"""bigbird: global, near and random blocks, as pairs, as lists, and as Transformers has it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import BigBirdConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

import attlas
from attlas import masks
from attlas.layers.sparse.bigbird import BigBird


def layer(**options: object) -> BigBird:
    made = attlas.make("bigbird", **{"dim": 32, "heads": 4, "block": 4, "random": 2, **options})
    return made.double()


def visible(mixer: BigBird, tokens: int) -> Tensor:
    q, k, _, inputs = mixer.prepare(torch.randn(1, tokens, 32, dtype=torch.float64))
    return inputs.visible(q, k).expand(1, 4, tokens, tokens)[0]


@pytest.mark.parametrize("tokens", [10, 48, 51])
def test_bigbird_internal_sees_ends_window_and_drawn_blocks(tokens: int) -> None:
    seen, count = visible(layer(), tokens), -(-tokens // 4)
    for head in range(4):
        for i in range(count):
            row = seen[head, 4 * i : 4 * i + 4]
            blocks = {j for j in range(count) if row[:, 4 * j : 4 * j + 4].all()}
            assert blocks == {j for j in range(count) if row[:, 4 * j : 4 * j + 4].any()}
            fixed = {j for j in range(count) if abs(i - j) <= 1 or j in (0, count - 1)}
            if i in (0, count - 1):
                assert blocks == set(range(count))
            else:
                assert blocks >= fixed
                assert len(blocks - fixed) == min(2, count - len(fixed))
    assert count < 8 or not torch.equal(seen[0], seen[1])


def test_bigbird_external_sees_extra_tokens_and_is_seen_by_them() -> None:
    seen = visible(layer(form="external", extra=3, random=0), 23)
    i = torch.arange(23)
    block = (i - 3) // 4
    near = (block[:, None] - block).abs() <= 1
    wanted = near | (i < 3) | (i < 3)[:, None]
    assert torch.equal(seen, wanted.expand(4, -1, -1))


@pytest.mark.parametrize("options", [{}, {"form": "external", "extra": 5}, {"window": 1, "random": 0}])
def test_bigbird_lists_and_masked_dense_attention_agree(options: dict[str, object]) -> None:
    """400 tokens go through lists of blocks; the same pairs as booleans are the plain form."""
    mixer, x = layer(**options), torch.randn(1, 400, 32, dtype=torch.float64, requires_grad=True)
    q, k, v, inputs = mixer.prepare(x)
    assert isinstance(inputs.pairs, masks.Mask)
    listed = mixer.attend(q, k, v, inputs)
    inputs.pairs = inputs.visible(q, k)
    dense = mixer.attend(q, k, v, inputs)
    torch.testing.assert_close(listed, dense, rtol=0, atol=1e-5)
    one, two = (torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (listed, dense))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_bigbird_is_that_of_transformers_for_given_random_blocks() -> None:
    config = BigBirdConfig(
        hidden_size=32, num_attention_heads=4, block_size=4, num_random_blocks=2,
        max_position_embeddings=64, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = BigBirdBlockSparseAttention(config, seed=3).double().train()
    x, ones = torch.randn(2, 64, 32, dtype=torch.float64), torch.ones(2, 64, dtype=torch.float64)
    blocked = ones.view(2, 16, 4)
    band = torch.einsum("blq,blk->blqk", blocked[:, 2:-2], torch.cat(
        [blocked[:, 1:-3], blocked[:, 2:-2], blocked[:, 3:-1]], dim=2
    )).unsqueeze(1)  # fmt: skip
    out, weights = theirs(
        x, band_mask=band, from_mask=ones[:, None, :, None], to_mask=ones[:, None, None],
        from_blocked_mask=blocked, to_blocked_mask=blocked, output_attentions=True,
    )  # fmt: skip

    class Given(BigBird):
        """With blocks that were drawn elsewhere."""

        def table(self, counts: Tensor, columns: int, some: slice = slice(None)) -> Tensor:
            return weights[:1].unflatten(3, (16, 4)).unflatten(2, (16, 4)).sum((3, 5))[:, :, some] > 0

    ours = Given(32, 4, block=4, random=2, bias=True).double()
    for mine, name in (("q", "query"), ("k", "key"), ("v", "value")):
        getattr(ours, f"{mine}_proj").load_state_dict(getattr(theirs, name).state_dict())
    ours.o_proj.weight.data = torch.eye(32, dtype=torch.float64)
    ours.o_proj.bias.data.zero_()
    torch.testing.assert_close(ours(x), out, rtol=0, atol=1e-5)


def test_bigbird_any_two_tokens_are_connected_through_two_layers() -> None:
    for options in ({"random": 0}, {"form": "external", "extra": 2, "random": 0}):
        seen = visible(layer(**options), 61)
        assert ((seen.int() @ seen.int()) > 0).all()


def test_bigbird_cost_grows_linearly() -> None:
    """A block of queries that is not global has as many keys in a text of any length."""
    for tokens in (128, 512):
        seen = visible(layer(), tokens)
        assert seen[:, 4:-4].sum(-1).max() <= 4 * (3 + 2 + 2)


def test_bigbird_refuses_what_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="window"):
        layer(window=2)
    with pytest.raises(ValueError, match="extra"):
        layer(extra=4)
    with pytest.raises(ValueError, match="causal"):
        layer(causal=True)
