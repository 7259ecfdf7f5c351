"""What the row of SinkLoRA says, sentence by sentence; training is in benchmarks/adapters.py."""

from __future__ import annotations

import pytest
import torch

import attlas
from attlas import masks, ops
from attlas.adapt.sinklora import LowRank, groups
from attlas.attach import attach
from attlas.contract.families import find
from attlas.contract.masks import grid_measures
from attlas.contract.parts import continued, prompt, small_llama
from attlas.kinds.adapter import Adapter


def injected(model=None, **options):
    adapter = attlas.make("sinklora", **{"group": 8, **options})
    model = small_llama() if model is None else model
    adapter.inject(model)
    return adapter, model


def disturb(adapter):
    with torch.no_grad():
        for parameter in adapter.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter))


def published(q, k, v, size):
    """Half of the heads rolled by half a group, all cut in groups, and the rolled ones rolled back."""
    heads, tokens = q.shape[1], q.shape[2]
    q, k, v = (x.clone() for x in (q, k, v))
    for x in (q, k, v):
        x[:, heads // 2 :] = x[:, heads // 2 :].roll(-(size // 2), dims=2)
    cut = [x.unflatten(2, (tokens // size, size)).transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    out = ops.attend(*cut, mask=masks.causal)
    out = out.unflatten(0, (-1, tokens // size)).transpose(1, 2).flatten(2, 3)
    out[:, heads // 2 :] = out[:, heads // 2 :].roll(size // 2, dims=2)
    return out


# Without sink and reassembly it equals the published shifted sparse attention ------------------------


@pytest.mark.parametrize(("tokens", "size", "heads"), [(32, 8, 4), (24, 4, 6), (30, 6, 3), (12, 12, 2)])
def test_without_sinks_and_reassembly_it_is_the_published_attention(tokens, size, heads):
    q, k, v = torch.randn(3, 2, heads, tokens, 8, dtype=torch.float64).unbind()
    ours, theirs = ops.attend(q, k, v, mask=groups(size, heads)), published(q, k, v, size)
    back = size // 2
    torch.testing.assert_close(ours[:, : heads // 2], theirs[:, : heads // 2])
    torch.testing.assert_close(ours[:, :, back:], theirs[:, :, back:])
    assert not torch.allclose(ours[:, heads // 2 :, :back], theirs[:, heads // 2 :, :back])  # the leak


# No token sees its future ----------------------------------------------------------------------------


@pytest.mark.parametrize("returned", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("sinks", [0, 4])
def test_the_mask_by_hand(returned, sinks):
    heads, size, tokens = 8, 6, 26
    found = masks.dense(groups(size, heads, returned=returned, sinks=sinks), tokens, tokens)[0]
    for h in range(heads):
        shift = size // 2 if h >= 4 + 4 * returned else 0
        wanted = [
            [k <= q and (k < sinks or (q + shift) // size == (k + shift) // size) for k in range(tokens)]
            for q in range(tokens)
        ]
        assert found[h].tolist() == wanted
    mask = groups(size, heads, returned=returned, sinks=sinks)
    for block in (1, 3, 4, 16):  # what is claimed of blocks of pairs holds
        for told in grid_measures("mask", mask, tokens, tokens, block):
            assert told.error == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_token_sees_its_future_in_training(attention):
    adapter, model = injected(find("llama").model(attention))
    disturb(adapter)
    ids = prompt(32)
    model.train()
    found = model(ids, use_cache=False).logits
    for place in (1, 9, 20, 31):
        other = ids.clone()
        other[0, place:] = 65 - other[0, place:]
        again = model(other, use_cache=False).logits
        torch.testing.assert_close(again[:, :place], found[:, :place], rtol=0, atol=1e-5)
    assert not torch.allclose(found, model.eval()(ids).logits)


# Group size equal to the length is full attention ----------------------------------------------------


@pytest.mark.parametrize("group", [32, 33, 1000])
def test_a_group_of_the_whole_text_is_full_attention(group):
    adapter, model = injected(group=group)
    disturb(adapter)
    assert torch.equal(model.train()(prompt(32)).logits, model.eval()(prompt(32)).logits)
    q, k, v = torch.randn(3, 1, 4, 32, 8).unbind()
    if group == 32:
        every = ops.attend(q, k, v, mask=groups(group, 4, returned=1.0))
        torch.testing.assert_close(every, ops.attend(q, k, v, mask=masks.causal))


def test_a_group_is_a_quarter_of_the_text_unless_given():
    adapter, model = injected(group=None)
    twin, other = injected(group=8)
    ids = prompt(32)
    assert torch.equal(model.train()(ids).logits, other.train()(ids).logits)
    assert adapter.options["group"] is None
    assert twin.options["group"] == 8


def test_at_test_attention_is_the_models_own():
    _, model = injected()
    assert torch.equal(model.eval()(prompt(32)).logits, small_llama()(prompt(32)).logits)


def test_heads_sinks_and_groups_are_what_attention_reads():
    _, model = injected(sinks=2, returned=0.5)
    model.train()
    with attach(model, record=["weights"]) as session, torch.no_grad():
        model(prompt(32), use_cache=False)
        found = session["weights"][0, 0] > 0
    assert torch.equal(found, masks.dense(groups(8, 4, returned=0.5, sinks=2), 32, 32)[0])


def test_padding_on_the_right_changes_nothing_and_on_the_left_is_refused():
    _, model = injected()
    model.train()
    ids, mask = prompt(32), torch.ones(1, 32, dtype=torch.long)
    mask[:, 27:] = 0
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, use_cache=False).logits[:, :27]
        torch.testing.assert_close(padded, model(ids[:, :27], use_cache=False).logits)
    with pytest.raises(ValueError, match="pad on the right"):
        model(ids, attention_mask=mask.flip(1), use_cache=False)


# Low-rank differences, embeddings and norms ----------------------------------------------------------


def test_embeddings_norms_and_differences_are_trained():
    adapter, _ = injected()
    names = set(adapter.trainable())
    layer = "model.layers.0."
    assert {"model.embed_tokens.weight", "model.norm.weight", f"{layer}input_layernorm.weight",
            f"{layer}post_attention_layernorm.weight", f"{layer}self_attn.o_proj.a"} <= names  # fmt: skip
    assert not any("mlp" in name for name in names)
    assert len(names) == 6 * (4 * 2 + 2) + 2


def test_the_difference_is_that_of_peft():
    peft = pytest.importorskip("peft")
    from peft.tuners.lora import Linear

    linear = torch.nn.Linear(12, 20)
    ours = LowRank(linear, rank=8, alpha=16.0)
    config = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0)
    theirs = Linear(linear, "default", config, r=8, lora_alpha=16)
    with torch.no_grad():
        ours.b.normal_()
        theirs.lora_A["default"].weight.copy_(ours.a)
        theirs.lora_B["default"].weight.copy_(ours.b)
    x = torch.randn(3, 5, 12)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.weight - linear.weight, theirs.get_delta_weight("default"))


def test_tuned_saved_merged_and_decoded_with_heavy_hitters(tmp_path):
    adapter, model = injected()
    adam = torch.optim.AdamW(adapter.trainable().values(), lr=1e-2)
    model.train()
    losses = []
    for _ in range(5):
        loss = adapter.loss(model, prompt(32, 2), 0.0)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    path, other = adapter.save(tmp_path / "tuned.safetensors"), small_llama()
    Adapter.load(path, other)
    assert torch.equal(other(prompt(32)).logits, model(prompt(32)).logits)
    wanted = model(prompt(32)).logits
    merged = adapter.merge()
    torch.testing.assert_close(merged(prompt(32)).logits, wanted)
    with attach(merged, attlas.make("observed-attention", keep=0.5)) as session:
        assert continued(merged, prompt(32)).isfinite().all()
        assert session.cache.layers[0].keys.shape[2] < 32


def test_what_cannot_work_is_named():
    for family in ("gpt2", "gpt-neox"):
        with pytest.raises(ValueError, match="q_proj"):
            injected(find(family).model())
    _, model = injected()
    cache = model(prompt(8), use_cache=True)
    model.train()
    with pytest.raises(ValueError, match="whole texts"):
        model(prompt(8), **{attlas.hf.caches.NAME: attlas.hf.caches.cache_of(cache)})
    for wrong in ({"group": 0}, {"sinks": -1}, {"returned": 1.5}, {"rank": 0}, {"alpha": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            attlas.make("sinklora", **wrong)
