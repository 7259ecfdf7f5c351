"""What the row of block attention says, sentence by sentence, and the cache of passages."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attlas
from attlas.adapt.block_attention import block_mask
from attlas.attach import attach
from attlas.contract.families import distinct, find
from attlas.contract.masks import grid_measures
from attlas.contract.parts import prompt, small_llama
from attlas.hf.caches import DynamicCache, StaticCache, cache_of, with_cache
from attlas.kinds.adapter import Adapter

SIZES = [5, 9, 3]


def texts(seed: int = 1, sizes=SIZES):
    """Passages of these sizes, and a question of six tokens."""
    return prompt(sum(sizes) + 6, seed=seed)[0].split([*sizes, 6])


def injected(model=None, **options):
    adapter = attlas.make("block-attention-rag", **options)
    model = small_llama() if model is None else model
    adapter.inject(model)
    return adapter, model


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# The mask --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[1, 1], [4, 2, 7], [3, 5, 1, 6]])
def test_the_mask_by_hand(sizes):
    block = [n for n, size in enumerate(sizes) for _ in range(size)]
    last = len(sizes) - 1
    wanted = [
        [j <= i and (block[i] == block[j] or block[i] == last) for j in range(len(block))]
        for i in range(len(block))
    ]
    ids = torch.tensor([block])
    found = attlas.masks.dense(block_mask(ids, ids == last), len(block), len(block))
    assert torch.equal(found[0, 0], torch.tensor(wanted))
    for size in (1, 3, 4):  # what is claimed of blocks of pairs holds
        mask = block_mask(ids, ids == last)
        for told in grid_measures("mask", mask, len(block), len(block), size):
            assert told.error == 0


def test_passages_do_not_see_each_other_and_the_question_sees_them_all():
    adapter, model = injected()
    ids = torch.cat(texts())[None]
    with adapter.passages(SIZES):
        found = logits(model, ids)
        for place, unchanged in ((2, slice(5, 17)), (7, slice(14, 17))):
            other = ids.clone()
            other[0, place] = 63 - other[0, place]
            again = logits(model, other)
            torch.testing.assert_close(again[:, unchanged], found[:, unchanged], rtol=0, atol=0)
            assert (again[:, 17:] - found[:, 17:]).abs().amin(-1).amax() > 1e-6
    assert not torch.allclose(logits(model, ids)[:, 5:], found[:, 5:])  # outside: the model as it is


# Re-rotated cached keys equal freshly computed keys of the masked model to 1e-4 ------------------------


@pytest.mark.parametrize("family", distinct(
    "paired-rotary", "partial-rotary", "some-rotary", "key-norm", having=["rotary"],
    lacking=["windows", "varying-rotary", "states", "latents", "shared-keys"],
))  # fmt: skip
def test_moved_keys_equal_those_of_the_masked_model(family):
    adapter, model = injected(find(family).model())
    *passages, question = texts()
    with adapter.passages(SIZES), torch.no_grad():
        whole = model(torch.cat([*passages, question])[None], use_cache=True)
    cache = adapter.context(passages)
    assert cache.get_seq_length() == sum(SIZES)
    for ours, fresh in zip(cache.layers, cache_of(whole).layers, strict=True):
        for name in ("keys", "values"):
            theirs = getattr(fresh, name)[:, :, : sum(SIZES)]
            torch.testing.assert_close(getattr(ours, name), theirs, rtol=1e-4, atol=1e-4)
    found = logits(model, question[None], **with_cache(model, cache))
    torch.testing.assert_close(found, whole.logits[:, sum(SIZES) :], rtol=1e-4, atol=1e-4)


def test_far_from_the_beginning_too():
    torch.manual_seed(0)
    adapter, model = injected(small_llama(torch.float32))
    passages = [prompt(300, seed=n)[0] for n in range(2, 5)]
    with adapter.passages([300] * 3), torch.no_grad():
        fresh = cache_of(model(torch.cat(passages)[None], use_cache=True))
    for ours, theirs in zip(adapter.context(passages).layers, fresh.layers, strict=True):
        # Of the keys' length: angles of some hundred radians are rounded in single precision.
        assert (ours.keys - theirs.keys).norm() < 1e-4 * theirs.keys.norm()


def test_yarn_keeps_its_scale_once():
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
            "original_max_position_embeddings": 128}  # fmt: skip
    model = find("llama").model(rope_scaling=rope)
    assert model.model.rotary_emb.attention_scaling > 1
    adapter, _ = injected(model)
    *passages, _ = texts()
    with adapter.passages(SIZES), torch.no_grad():
        fresh = cache_of(model(torch.cat(passages)[None], use_cache=True))
    for ours, theirs in zip(adapter.context(passages).layers, fresh.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)


# Prefill FLOPs for cached passages are zero ------------------------------------------------------------


def test_cached_passages_cost_no_products(tmp_path):
    adapter, _ = injected(folder=str(tmp_path))
    *passages, question = texts()
    assert flops(lambda: adapter.context(passages)) > 0
    assert flops(lambda: adapter.context(passages)) == 0
    assert flops(lambda: adapter.context(passages[::-1])) == 0  # elsewhere in a prompt
    fresh, _ = injected()
    one = flops(lambda: adapter.context([*passages, question]))
    assert one == flops(lambda: fresh.context([question]))  # only what is new is read
    again, _ = injected(folder=str(tmp_path))
    found = again.context(passages)
    assert flops(lambda: again.context(passages)) == 0
    other, _ = injected(folder=str(tmp_path))
    assert flops(lambda: other.context(passages)) == 0  # from disk
    for a, b in zip(found.layers, adapter.context(passages).layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)


def test_a_context_is_its_users_own():
    adapter, model = injected()
    *passages, question = texts()
    first = logits(model, question[None], **with_cache(model, adapter.context(passages)))
    adapter.context(passages).layers[0].keys.zero_()
    again = logits(model, question[None], **with_cache(model, adapter.context(passages)))
    assert torch.equal(first, again)
    one = adapter.context(passages[:1])
    one.layers[0].values.zero_()
    assert adapter.context(passages[:1]).layers[0].values.abs().sum() > 0


# Models and files --------------------------------------------------------------------------------------


def test_passages_of_another_model_are_refused_by_name(tmp_path):
    *passages, _ = texts()
    injected(folder=str(tmp_path))[0].context(passages)
    other = small_llama()
    with torch.no_grad():
        other.model.layers[2].self_attn.k_proj.weight.mul_(1.0001)  # tuned a little
    for model, named in ((other, "weights"), (small_llama(torch.float32), "weights|dtype"),
                         (find("llama").model(vocab_size=64), "num_hidden_layers")):  # fmt: skip
        adapter, _ = injected(model, folder=str(tmp_path))
        with pytest.raises(ValueError, match=f"another model: its ({named})"):
            adapter.context(passages)


def test_damaged_and_strange_files_are_told(tmp_path):
    *passages, _ = texts()
    injected(folder=str(tmp_path))[0].context(passages[:1])
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        injected(folder=str(tmp_path))[0].context(passages[:1])
    path.write_bytes((8).to_bytes(8, "little") + b"{}      ")
    with pytest.raises(ValueError, match="no passage stored by attlas"):
        injected(folder=str(tmp_path))[0].context(passages[:1])


def test_tuned_weights_read_their_passages_anew():
    adapter, model = injected()
    *passages, _ = texts()
    before = adapter.context(passages).layers[1].keys
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    assert not torch.allclose(adapter.context(passages).layers[1].keys, before)


@pytest.mark.parametrize(("family", "named"), [
    ("gpt2", "does not rotate"), ("mistral-window", "DynamicSlidingWindowLayer"),
    ("olmo-dynamic", "frequencies"), ("jamba", "jamba"),
])  # fmt: skip
def test_models_whose_keys_cannot_be_moved_are_refused(family, named):
    with pytest.raises(ValueError, match=named):
        injected(find(family).model())


def test_flex_attention_is_refused():
    with pytest.raises(ValueError, match="flex_attention"):
        injected(find("llama").model("flex_attention"))


# Rows, padding, caches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_several_lengths_with_padding(attention, side):
    model = find("llama").model(attention)
    adapter, _ = injected(model)
    rows, sizes = [torch.cat(texts(1)), torch.cat(texts(2, [4, 2]))], [SIZES, [4, 2]]
    most = max(map(len, rows))
    ids, mask = torch.zeros(2, most, dtype=torch.long), torch.zeros(2, most, dtype=torch.long)
    spans = [slice(most - len(r), most) if side == "left" else slice(0, len(r)) for r in rows]
    for n, (row, span) in enumerate(zip(rows, spans, strict=True)):
        ids[n, span], mask[n, span] = row, 1
    with adapter.passages(sizes):
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        found = logits(model, ids, attention_mask=mask, position_ids=places)
    for n, (row, span) in enumerate(zip(rows, spans, strict=True)):
        with adapter.passages(sizes[n]):
            alone = logits(model, row[None])[0]
        torch.testing.assert_close(found[n, span], alone, rtol=1e-4, atol=1e-4)


def test_pieces_steps_and_static_caches_equal_one_pass():
    adapter, model = injected()
    ids = torch.cat(texts())[None]
    caches = [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)]
    with adapter.passages(SIZES):
        whole = logits(model, ids)
        for cache in caches:
            pieces = [
                logits(model, p, **with_cache(model, cache)) for p in ids.split([7, 1, 4, 8, 1, 2], 1)
            ]
            torch.testing.assert_close(torch.cat(pieces, 1), whole)


@pytest.mark.parametrize("beams", [1, 2])
def test_generating_from_a_context_equals_generating_under_the_mask(beams):
    adapter, model = injected()
    *passages, question = texts()
    ids = torch.cat([*passages, question])[None]
    given = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams,
             "attention_mask": torch.ones_like(ids)}  # fmt: skip
    with adapter.passages(SIZES):
        masked = model.generate(ids, **given)
    cache = adapter.context(passages)
    cache.batch_repeat_interleave(beams)
    assert torch.equal(model.generate(ids, **with_cache(model, cache), **given), masked)


def test_recorded_weights_between_passages_are_zero():
    adapter, model = injected()
    ids = torch.cat(texts())[None]
    with adapter.passages(SIZES), attach(model, record=["weights"]) as session:
        logits(model, ids)
        weights = session["weights"]
    assert weights[..., 5:14, :5].abs().max() == 0
    assert (weights[..., 17:, :5] > 0).all()


def test_a_copy_has_passages_of_its_own():
    adapter, model = injected()
    ids = torch.cat(texts())[None]
    twin = deepcopy(model)
    with adapter.passages(SIZES):
        masked = logits(model, ids)
        assert torch.equal(logits(twin, ids), logits(small_llama(), ids))
    assert not torch.allclose(masked, logits(model, ids))


def test_gradient_checkpointing_is_refused_where_pairs_are_hidden():
    adapter, model = injected()
    older = getattr(model, "gradient_checkpointing_enable", None)
    getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})
    model.train()
    ids = torch.cat(texts())[None]
    model(ids, use_cache=False)
    with adapter.passages(SIZES), pytest.raises(ValueError, match="gradient checkpointing"):
        model(ids, use_cache=False)


@pytest.mark.parametrize("lengths", [[], [[]], [3, 0], [[2], [-1]]])
def test_lengths_of_nothing_are_refused(lengths):
    adapter, _ = injected()
    with pytest.raises(ValueError, match="at least 1"), adapter.passages(lengths):
        pass


def test_wrong_calls_are_named():
    adapter, model = injected()
    with adapter.passages([[3], [4], [5]]), pytest.raises(ValueError, match="3 rows"):
        logits(model, prompt(12, 2))
    for wrong in ([], [torch.zeros(0, dtype=torch.long)], [prompt(3)]):
        with pytest.raises(ValueError, match="context takes passages"):
            adapter.context(wrong)
    with pytest.raises(ValueError, match="blocks=8"):
        adapter.loss(model, prompt(4), 0.0)
    with pytest.raises(ValueError, match="context"):
        attlas.make("block-attention-rag").context([prompt(3)[0]])


# Tuning ------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_last_block_in_both_modes():
    adapter, model = injected(blocks=4)
    ids = prompt(22, 2)
    picked = -torch.log_softmax(logits(model, ids)[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    with adapter.passages([5, 5, 5]):
        apart = -torch.log_softmax(logits(model, ids)[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0]
    wanted = (picked[:, 14:].mean() + apart[:, 14:].mean()) / 2
    assert adapter.loss(model, ids, 0.0).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_what_was_tuned_is_saved_and_merged(tmp_path):
    adapter, model = injected(blocks=3)
    adam = torch.optim.AdamW(adapter.trainable().values(), lr=1e-2)
    ids = prompt(24, 2)
    losses = []
    for _ in range(5):
        loss = adapter.loss(model, ids, 0.0)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    path = adapter.save(tmp_path / "tuned.safetensors")
    other = small_llama()
    twin = Adapter.load(path, other)
    sizes = torch.cat(texts())[None]
    with adapter.passages(SIZES), twin.passages(SIZES):
        assert torch.equal(logits(other, sizes), logits(model, sizes))
    merged = adapter.merge()
    with injected(merged)[0].passages(SIZES), twin.passages(SIZES):
        assert torch.equal(logits(merged, sizes), logits(other, sizes))
