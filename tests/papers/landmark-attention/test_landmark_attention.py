"""landmark-attention: earlier blocks are entered through their last tokens, all or k of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import attlas
from attlas import masks
from attlas.layers.sparse.landmark import Landmark, place_landmarks

NAME = "landmark-attention"


def _layer(**options: object) -> Landmark:
    return attlas.make(NAME, **{"dim": 32, "heads": 4, "block": 4, **options}).double().eval()


def _x(tokens: int = 27, batch: int = 2) -> Tensor:
    return torch.randn(batch, tokens, 32, dtype=torch.float64)


def _other(layer: Landmark, **options: object) -> Landmark:
    made = _layer(**{"kv_heads": layer.kv_heads, "block": layer.block, **options})
    made.load_state_dict(layer.state_dict())
    return made


def _defined(scores: Tensor, block: int) -> Tensor:
    """Weights of one head, query by query and block by block."""
    weights = torch.zeros_like(scores)
    for t, row in enumerate(scores):
        own = t // block
        tokens = [j for j in range(own * block, t + 1) if j % block != block - 1]
        landmarks = [b * block + block - 1 for b in range(own)]
        shares = row[[*tokens, *landmarks]].softmax(-1)
        weights[t, tokens] = shares[: len(tokens)]
        for b, share in enumerate(shares[len(tokens) :]):
            inside = slice(b * block, b * block + block - 1)
            weights[t, inside] = share * row[inside].softmax(-1)
    return weights


@pytest.mark.parametrize("block", [2, 4, 7])
def test_weights_are_the_products_that_the_paper_defines(block: int) -> None:
    layer, x = _layer(block=block), _x()
    q, k, *_ = layer.prepare(x)
    scores = q @ k.mT * layer.scale
    weights = layer.weights(x)
    for b in range(2):
        for h in range(4):
            torch.testing.assert_close(weights[b, h], _defined(scores[b, h], block))


@pytest.mark.parametrize("retrieve", [None, 1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_rows_sum_to_one(retrieve: int | None, padded: bool) -> None:
    layer, x = _layer(retrieve=retrieve, position="rope"), _x()
    valid = torch.ones(2, 27, dtype=torch.bool)
    if padded:
        valid[0, :6], valid[1, [3, 4, 9, 26]] = False, False
    weights = layer.weights(x, mask=valid)
    sums = weights.sum(-1).mT[valid]
    torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-6, rtol=0)
    rank = (valid.long().cumsum(-1) - 1)[:, None, None]
    assert bool((weights.masked_select(rank % 4 == 3) == 0).all())  # no landmark is read
    assert bool((weights >= 0).all())


def test_rows_sum_to_one_where_pairs_are_hidden() -> None:
    """A landmark that is seen takes no weight where no token of its block is."""
    layer, x = _layer(), _x()
    pairs = torch.rand(2, 4, 27, 27) < 0.4
    pairs[..., 3] = True
    pairs[:, :, 10:, :3] = False
    seen = pairs & torch.ones(27, 27, dtype=torch.bool).tril()
    at = torch.arange(27)
    blocks, mark = at // 4, at % 4 == 3
    # What can be reached: tokens of the own block, and those of a block whose landmark is seen.
    own = seen & (blocks[:, None] == blocks) & ~mark
    reached = own.any(-1)
    for b in range(6):
        tokens, landmark = seen[..., 4 * b : 4 * b + 3], seen[..., 4 * b + 3]
        reached = reached | (tokens.any(-1) & landmark & (blocks > b))
    torch.testing.assert_close(layer.weights(x, mask=pairs).sum(-1), reached.double())


@pytest.mark.parametrize("position", [None, "rope", "alibi", "t5", "learned"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_retrieving_all_blocks_is_attention_as_in_training(position: str | None, kv_heads: int) -> None:
    options = {"kv_heads": kv_heads, "position": position}
    layer, x = _layer(**options), _x()
    some = _other(layer, retrieve=6, position=position)
    torch.testing.assert_close(some(x), layer(x))
    torch.testing.assert_close(some.weights(x), layer.weights(x))
    valid = torch.ones(2, 27, dtype=torch.bool)
    valid[0, :5] = False
    wanted, found = layer(x, mask=valid), some(x, mask=valid)
    torch.testing.assert_close(found[valid], wanted[valid])


def test_each_head_enters_the_blocks_of_highest_landmark_score() -> None:
    layer, x = _layer(retrieve=2), _x()
    q, k, *_ = layer.prepare(x)
    scores = (q @ k.mT * layer.scale)[..., 3::4]
    weights = layer.weights(x).unflatten(-2, (27,))
    for t in range(27):
        inside = weights[:, :, t, : t // 4 * 4].unflatten(-1, (-1, 4)).sum(-1) > 0
        best = scores[:, :, t, : t // 4].topk(min(2, t // 4), dim=-1).indices
        wanted = torch.zeros_like(inside).scatter(-1, best, True)
        assert torch.equal(inside, wanted)


def test_chosen_blocks_are_said_to_stand_next_to_the_query() -> None:
    """Rotary attention to these blocks alone, at the places that they are given, is the same."""
    torch.manual_seed(0)
    layer, x = _layer(retrieve=2, heads=1, position="rope"), _x(31, 1)
    plain = _other(layer, heads=1, position="rope")
    weights = layer.weights(x)[0, 0]
    seen = set()
    for t in (27, 29, 30):
        own = t // 4
        inside = weights[t, : own * 4].unflatten(-1, (-1, 4)).sum(-1) > 0
        chosen = inside.nonzero()[:, 0].tolist()
        old = [b for b in chosen if own - b > 2]
        seen.add(len(old))
        kept = [j for b in (*chosen, own) for j in range(4 * b, 4 * b + 4) if j <= t]
        # One block is left out between old blocks and those that are among the last two.
        apart = [len(chosen) - i + (b in old) for i, b in enumerate(chosen)]
        at = torch.tensor([4 * (own - d) + i for d in (*apart, 0) for i in range(4)])[: len(kept)]
        q, k = (p(x)[:, None] for p in (plain.q_proj, plain.k_proj))
        q = layer.position_encoding.rotate(q[:, :, kept], at[None])
        k = layer.position_encoding.rotate(k[:, :, kept], at[None])
        scores = (q @ k.mT * plain.scale)[0, 0]
        torch.testing.assert_close(weights[t, kept], _defined(scores, 4)[-1])
    assert seen != {0}


@pytest.mark.parametrize("position", [None, "rope", "alibi"])
@pytest.mark.parametrize("retrieve", [None, 1, 3])
def test_prefill_and_steps_are_one_pass_with_padding_too(
    position: str | None, retrieve: int | None
) -> None:
    layer, x = _layer(position=position, retrieve=retrieve, kv_heads=2), _x()
    valid = torch.ones(2, 27, dtype=torch.bool)
    valid[0, [0, 1, 7]], valid[1, 25] = False, False
    cache, seen, parts = layer.init_cache(), 0, []
    for part in x.split([11, 1, 1, 6, 1, 1, 6], dim=1):
        seen += part.shape[1]
        parts.append(layer(part, mask=valid[:, :seen], cache=cache))
    whole = layer(x, mask=valid)
    torch.testing.assert_close(torch.cat(parts, dim=1)[valid], whole[valid])
    for row in range(2):
        alone = layer(x[row : row + 1, valid[row]])[0]
        torch.testing.assert_close(whole[row, valid[row]], alone)


@pytest.mark.parametrize("position", [None, "rope"])
def test_gathered_blocks_give_the_gradients_of_the_map(position: str | None) -> None:
    layer, x = _layer(retrieve=2, position=position, kv_heads=2), _x().requires_grad_()
    q, k, v, inputs = layer.prepare(x)
    slow = layer.output(layer.aggregate(layer.weigh(q, k, inputs), v, inputs), inputs)
    found = [torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()]) for y in (layer(x), slow)]
    for fast, wanted in zip(*found, strict=True):
        torch.testing.assert_close(fast, wanted)


def test_a_pattern_of_the_layer_hides_blocks_whose_landmark_it_hides() -> None:
    layer, x = _layer(retrieve=3, mask=masks.window(9)), _x()
    weights = layer.weights(x)
    assert bool((weights[..., 20, :12] == 0).all())
    assert bool((weights[..., 20, 12:15] > 0).all())


def test_landmarks_are_placed_behind_every_block() -> None:
    placed = place_landmarks(torch.arange(1, 9)[None], 0, 4)
    assert placed.tolist() == [[1, 2, 3, 0, 4, 5, 6, 0, 7, 8]]
    with pytest.raises(ValueError, match="block"):
        place_landmarks(torch.arange(4)[None], 0, 1)


@pytest.mark.parametrize("options", [{"block": 1}, {"retrieve": 0}, {"causal": False}])
def test_bad_options_are_named(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        attlas.make(NAME, **{"dim": 8, "heads": 2, **options})


SYMBOLS, KEY, LANDMARK = 16, 16, 17


def _passkeys(rng: torch.Generator, rows: int, tokens: int, block: int) -> tuple[Tensor, Tensor]:
    """Symbols at random, a key before one of them, and the key again: which symbol stood behind it?"""
    text = torch.randint(0, SYMBOLS, (rows, tokens), generator=rng)
    each, row = block - 1, torch.arange(rows)
    at = each * torch.randint(0, (tokens - 1) // each, (rows,), generator=rng)
    at += torch.randint(0, each - 1, (rows,), generator=rng)
    text[row, at] = KEY
    asked = torch.cat((text, torch.full((rows, 1), KEY)), dim=1)
    return place_landmarks(asked, LANDMARK, block), text[row, at + 1]


def test_a_small_model_finds_a_passkey_at_eight_times_its_training_length() -> None:
    torch.manual_seed(0)
    rng, block, longest = torch.Generator().manual_seed(0), 8, 42
    attention = {"name": NAME, "block": block, "position": "rope"}
    model = attlas.Decoder(attlas.DecoderConfig(
        vocab_size=SYMBOLS + 2, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        attention=attention,
    ))  # fmt: skip
    steps = 240
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(steps):
        tokens = int(torch.randint(2 * (block - 1), longest + 1, (), generator=rng))
        ids, answers = _passkeys(rng, 32, tokens, block)
        loss = cross_entropy(model(ids, use_cache=False).logits[:, -1], answers)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
    model.eval()
    for layer in model.modules():
        if isinstance(layer, Landmark):
            layer.retrieve = 4
    for times in (1, 8):
        ids, answers = _passkeys(rng, 64, times * longest, block)
        with torch.no_grad():
            found = model(ids, use_cache=False).logits[:, -1].argmax(-1)
        assert float((found == answers).float().mean()) > 0.9
