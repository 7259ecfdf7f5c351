"""What the row of SEA says, sentence by sentence."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, interpolate

import attlas
from attlas.adapt.sea import (
    NAMES,
    SEA,
    Estimator,
    chosen,
    column_of,
    features,
    keys_read,
    stretched,
)
from attlas.attach import attach
from attlas.contract.families import find
from attlas.contract.parts import prompt, small_llama
from attlas.hf.caches import DynamicCache, StaticCache, with_cache


def injected(model=None, **options) -> tuple[SEA, object]:
    """With an estimate that is not flat."""
    model = small_llama() if model is None else model
    adapter = attlas.make("sea-attention", **{"keep": 4, "columns": 8, **options})
    adapter.inject(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for part in adapter.layers.parameters():
            part.add_(0.3 * torch.randn_like(part))
    return adapter, model


def logits(model, ids: Tensor, **options) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits


# The mask has the requested number of non-zeros, and is causal ------------------------------------------


@pytest.mark.parametrize("columns", [8, 16, 64])
@pytest.mark.parametrize("keep", [1, 3, 7])
def test_sea_attention_mask_has_as_many_keys_as_were_asked_for(columns: int, keep: int) -> None:
    """H · keep for each query, all heads together, but for the rounding of columns to keys."""
    heads, n = 4, 96
    scores = torch.randn(2, heads, n, columns, generator=torch.Generator().manual_seed(0))
    ranks = torch.arange(n).expand(2, -1)
    marked = chosen(scores, ranks + 1, keep)
    pairs = stretched(marked, ranks + 1, ranks)
    later = torch.ones(n, n, dtype=torch.bool).triu(1)
    assert not (pairs & later).any()
    for t in range(n):
        wanted = min(max(1, round(heads * keep * columns / (t + 1))), heads * columns)
        assert (marked[:, :, t].sum((1, 2)) == wanted).all()
        found = pairs[:, :, t].sum((1, 2))
        width = (t + 1) / columns
        if t < keep:
            assert (found == heads * (t + 1)).all()
        elif width == int(width):
            assert (found == wanted * width).all()
            assert (found - heads * keep).abs().max() <= max(width, 1)
        else:
            assert (found - wanted * width).abs().max() < wanted
    own = torch.eye(n, dtype=torch.bool)
    assert torch.equal(keys_read(scores, ranks, ranks, keep), pairs | own)


@pytest.mark.parametrize("columns", [4, 12, 64])
def test_sea_attention_columns_are_stretched_as_the_authors_do(columns: int) -> None:
    """Column c to the keys from ⌊c n/K⌉ on, halves upwards."""
    ranks = torch.arange(70)[None]
    for n in (1, 3, 12, 13, 50, 70):
        found = column_of(torch.tensor([[n]]), ranks, columns)[0, 0, :n]
        edges = [int(c * n / columns + 0.5) for c in range(columns + 1)]
        for c in range(columns):
            assert (found == c).nonzero()[:, 0].tolist() == list(range(edges[c], edges[c + 1]))


def test_sea_attention_takes_the_largest_of_all_heads() -> None:
    scores = torch.zeros(1, 2, 1, 4)
    scores[0, 1, 0, 2], scores[0, 0, 0, 3] = 3.0, 2.0
    marked = chosen(scores, torch.tensor([[4]]), 1)  # two of eight
    assert marked.nonzero().tolist() == [[0, 0, 0, 3], [0, 1, 0, 2]]
    scores[0, 0, 0, 3], scores[0, 1, 0, 1] = 0.0, 3.0
    assert chosen(scores, torch.tensor([[4]]), 1).nonzero()[:, 1].tolist() == [1, 1]


def test_sea_attention_the_model_reads_what_the_mask_says() -> None:
    adapter, model = injected()
    ids = prompt(40, 2)
    with attach(model, record=["weights"]) as session:
        logits(model, ids)
        read = session["weights"] > 0
    assert not read.triu(1).any()
    assert read.diagonal(dim1=-2, dim2=-1).all()
    count = read[..., 39, :].sum((2, 3)).float() / read.shape[2]
    assert ((count >= 2.5) & (count <= 6)).all()  # about keep = 4 a head
    assert not torch.equal(read[:, :, 0], read[:, :, 1])
    assert adapter.layers[0].heads == read.shape[2]


# A perfect estimate with full k reproduces the teacher --------------------------------------------------


def test_sea_attention_with_all_keys_is_the_teacher() -> None:
    _, model = injected(keep=40, mix=False)
    assert torch.equal(logits(model, prompt(40, 2)), logits(small_llama(), prompt(40, 2)))
    adapter, model = injected(keep=40)
    for layer in adapter.layers:  # heads as they are, nothing of the mean
        torch.nn.init.zeros_(layer.scale.weight)
        torch.nn.init.constant_(layer.scale.bias, 50.0)
    torch.testing.assert_close(logits(model, prompt(40, 2)), logits(small_llama(), prompt(40, 2)))


def test_sea_attention_a_perfect_estimate_costs_nothing() -> None:
    """The teacher's own attention as the estimate: its distance is 0, and 0 alone."""
    adapter = attlas.make("sea-attention", keep=40, columns=40)
    adapter.inject(small_llama())
    ranks = torch.arange(40).expand(2, -1)
    at = column_of(ranks + 1, ranks, 40)
    v, wide = torch.randn(2, 4, 40, 8), torch.full((2, 4, 40, 2), 50.0)
    later = torch.ones(40, 40).triu(1).bool()
    weights = torch.randn(2, 4, 40, 40).masked_fill(later, -torch.inf).softmax(-1)
    scores = torch.full((2, 4, 40, 40), -30.0)
    for t in range(40):
        own = at[:, None, t, : t + 1].expand(-1, 4, -1)
        scores[:, :, t].scatter_(-1, own, weights[:, :, t, : t + 1].log())
    given = wide, torch.zeros_like(v), v, ranks
    assert adapter._distance(weights, scores, *given).abs() < 1e-6
    assert adapter._distance(weights, scores.roll(1, -1), *given) > 1e-3


# The estimate is the authors' ---------------------------------------------------------------------------


def test_sea_attention_estimate_is_the_definition() -> None:
    """Written densely: maps of all pairs, and convolutions of a whole picture."""
    torch.manual_seed(0)
    heads, d, columns, n = 3, 8, 16, 12
    made = Estimator(heads, d, columns, 20, features(d, 0)).double()
    q, k, v = torch.randn(3, 2, heads, n, d).double()
    ranks = torch.arange(n).expand(2, -1)
    found, scales, mean = made(q, k, v, ranks, None, dict.fromkeys(NAMES))
    fq, fk = ((x @ made.projection.T * d**-0.25).relu() + 1e-3 for x in (q, k))
    pairs = (fq @ fk.mT).tril()
    places = made.places[:n].expand(2, heads, -1, -1)
    context = pairs / pairs.sum(-1, keepdim=True) @ torch.cat((places, v), -1)
    z = gelu(made.encoded(made.encode(torch.cat((context, v), -1))))
    rows = made.row_norm(made.rows(z).view(2, heads, n, 2, -1))
    image = rows.permute(0, 1, 3, 2, 4).reshape(2, 2 * heads, n, -1)
    for convolution in made.convolve:
        weight = torch.zeros(2 * heads, 2 * heads, 5, 3).double()
        weight[:, :, :3] = convolution.weight  # rows after its own are masked
        image = conv2d(image, weight, convolution.bias, padding=(4, 2), dilation=2).relu()
    image = interpolate(image, scale_factor=(1, 4), mode="nearest")
    torch.testing.assert_close(found, made.norm(made.join(image)))
    torch.testing.assert_close(scales, made.scale(z))
    torch.testing.assert_close(mean, v.cumsum(2) / torch.arange(1, n + 1).view(n, 1))


def test_sea_attention_features_are_orthogonal_and_always_the_same() -> None:
    drawn = features(8, 3)
    assert drawn.shape == (16, 8)
    products = drawn[:8] @ drawn[:8].T
    torch.testing.assert_close(products, torch.diag(products.diag()), atol=1e-4, rtol=0)
    assert torch.equal(drawn, features(8, 3))
    assert not torch.equal(drawn, features(8, 4))


# Decoding, rows, copies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_sea_attention_pieces_and_steps_equal_one_pass(kind: str) -> None:
    _, model = injected()
    ids = prompt(40, 2)
    cache = (
        DynamicCache(config=model.config) if kind == "dynamic"
        else StaticCache(config=model.config, max_cache_len=48)
    )  # fmt: skip
    parts, sizes = [], []
    for piece in ids.split([11, 1, 1, 20, 7], dim=1):
        parts.append(logits(model, piece, **with_cache(model, cache)))
        sizes.append(sum(x.numel() for x in cache.layers[0].beside.values()))
    torch.testing.assert_close(torch.cat(parts, dim=1), logits(model, ids), rtol=1e-9, atol=1e-9)
    assert len({*sizes}) == 1  # what is remembered does not grow


def test_sea_attention_beams_take_their_states_along() -> None:
    _, model = injected()
    options = {"max_new_tokens": 10, "num_beams": 4, "do_sample": False, "num_return_sequences": 3}
    ids = prompt(16, 2)
    written = model.generate(ids, **options)
    assert torch.equal(written, model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sea_attention_padding_on_either_side_changes_nothing(attention: str) -> None:
    model = find("llama").model(attention)
    # Choices turn on the last bits; eager attention knows float32 alone.
    _, model = injected(model.double() if attention == "sdpa" else model)
    ids = prompt(30, 2)
    ids[0, :9], ids[1, 22:] = 0, 0
    found = logits(model, ids, attention_mask=(ids != 0).long(),
                   position_ids=((ids != 0).cumsum(-1) - 1).clamp(min=0))  # fmt: skip
    torch.testing.assert_close(found[:1, 9:], logits(model, ids[:1, 9:]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1:, :22], logits(model, ids[1:, :22]), rtol=1e-4, atol=1e-4)


def test_sea_attention_copies_and_saved_differences_compute_the_same(tmp_path) -> None:
    adapter, model = injected(small_llama(torch.float32))
    wanted = logits(model, prompt(20))
    assert torch.equal(logits(deepcopy(model), prompt(20)), wanted)
    path, fresh = adapter.save(tmp_path / "sea.safetensors"), small_llama(torch.float32)
    attlas.kinds.adapter.Adapter.load(path, fresh)
    assert torch.equal(logits(fresh, prompt(20)), wanted)


# Training -----------------------------------------------------------------------------------------------


def test_sea_attention_training_brings_it_near_the_teacher() -> None:
    """A reduced form of what benchmarks/claims_distilled.py measures with SmolLM2."""
    model = small_llama(torch.float32)
    adapter = attlas.make("sea-attention", keep=6, columns=16)
    held_out = torch.randint(1, 64, (4, 48), generator=torch.Generator().manual_seed(9))
    plain = logits(model, held_out).log_softmax(-1)
    torch.manual_seed(0)
    adapter.inject(model)

    def far() -> float:
        return float((plain.exp() * (plain - logits(model, held_out).log_softmax(-1))).sum(-1).mean())

    before, losses = far(), []
    optimizer = torch.optim.AdamW(adapter.trainable().values(), lr=1e-2)
    for step in range(60):
        loss = adapter.loss(model, torch.randint(1, 64, (4, 48)), step / 60)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert far() < 0.9 * before


# Refusals -----------------------------------------------------------------------------------------------


def test_sea_attention_refuses_what_it_cannot_estimate() -> None:
    for name, value in {"keep": 0, "columns": 6}.items():
        with pytest.raises(ValueError, match=name):
            attlas.make("sea-attention", **{name: value})
    with pytest.raises(ValueError, match="gpt_neox"):
        injected(find("gpt-neox").model())
    _, model = injected()
    ids, other = prompt(30), DynamicCache(config=model.config)
    logits(small_llama(), ids[:, :20], **with_cache(model, other))
    with pytest.raises(ValueError, match="read without the adapter"):
        logits(model, ids[:, 20:], **with_cache(model, other))
    with pytest.raises(ValueError, match="places for"):
        logits(model, prompt(model.config.max_position_embeddings + 1))
