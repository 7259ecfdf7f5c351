"""Caches are recognised by their type, and named as the model at hand names them."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import attlas
import tiny_models
from attlas.attach import attach
from attlas.errors import UserError
from attlas.hf.caches import NAME, NAMES, argument, cache_in, cache_of, the_cache, with_cache
from attlas.remembering import with_states
from attlas.storage import load_cache, save_cache
from attlas.storage.layer import StoredLayer

IDS = tiny_models.prompt(2, 9)


class Older(nn.Module):
    def forward(self, ids, past_key_values=None):
        return ids, past_key_values


class Newer(nn.Module):
    def forward(self, ids, cache=None):
        return ids, cache


def test_names_come_from_signatures() -> None:
    assert argument(Older) == "past_key_values"
    assert argument(Newer) == "cache"
    assert argument(attlas.Decoder) == NAME
    cache = DynamicCache()
    for model in (Older(), Newer()):
        assert cache_of(model(IDS, **with_cache(model, cache))) is cache
        assert cache_of(model(IDS)) is None


def test_a_cache_is_found_under_either_name() -> None:
    cache = DynamicCache()
    for name in NAMES:
        assert cache_in({"input_ids": IDS, name: cache}, Newer) == (name, cache)
    assert cache_in({"input_ids": IDS}, Older) == ("past_key_values", None)
    with pytest.raises(UserError, match="cache: list is no"):
        cache_in({"cache": [1]}, Newer)


@pytest.mark.skipif(NAME == "past_key_values", reason="the older name is the only one here")
def test_the_older_name_is_an_error_in_our_tests() -> None:
    model = tiny_models.decoder("llama")
    with pytest.raises(FutureWarning, match="past_key_values"):
        model(IDS, past_key_values=DynamicCache())
    with pytest.raises(AssertionError, match="past_key_values"):
        _ = model(IDS).past_key_values


def test_two_caches_are_refused() -> None:
    cache = DynamicCache()
    assert the_cache(cache, cache) is the_cache(cache, None) is the_cache(None, cache) is cache
    with pytest.raises(ValueError, match="past_key_values"):
        the_cache(cache, DynamicCache())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("swapped", [False, True])
def test_our_models_fill_a_cache_given_under_either_name(name: str, swapped: bool) -> None:
    if swapped:
        model = tiny_models.decoder("llama")
        attlas.swap(model, "lightning-attention-2")
        name = NAME  # the model around is Transformers', which warns of the older name
    else:
        config = attlas.DecoderConfig(
            vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
        )
        model = attlas.Decoder(config).eval()
    whole, cache = model(IDS).logits, DynamicCache()
    first = model(IDS[:, :6], **{name: cache})
    assert cache_of(first) is cache
    assert cache.get_seq_length() == 6
    rest = model(IDS[:, 6:], **{name: cache}).logits
    torch.testing.assert_close(rest, whole[:, 6:], rtol=1e-4, atol=1e-5)


def test_attach_finds_the_cache_of_a_model_under_either_name() -> None:
    model = tiny_models.decoder("llama")
    with torch.no_grad(), attach(model, attlas.make("streaming-llm", tokens=4)) as session:
        cache = DynamicCache(config=model.config)
        model(IDS, **with_cache(model, cache))
        assert session.cache is cache
        assert isinstance(cache.layers[0], StoredLayer)
        assert cache.layers[0].dense_slots == 4


# One layer that also remembers named tensors.


def stateful(tokens: int = 5) -> StoredLayer:
    cache = DynamicCache()
    x = torch.randn(2, 1, tokens, 4)
    cache.update(x, x + 1, 0)
    layer = with_states(cache, 0)
    layer.states["sum"] = x.sum(2)
    assert layer is cache.layers[0]
    return layer


def test_a_plain_layer_is_taken_over_with_its_keys() -> None:
    layer = stateful()
    assert layer.get_seq_length() == layer.dense_slots == 5
    assert layer.nbytes == sum(t.nbytes for t in (layer.keys, layer.values, layer.states["sum"]))
    more = torch.randn(2, 1, 2, 4)
    keys, _ = layer.update(more, more)
    assert keys.shape[2] == layer.get_seq_length() == 7


def test_states_follow_the_rows() -> None:
    layer, before = stateful(), stateful()
    before.states = dict(layer.states)
    layer.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(layer.states["sum"], before.states["sum"].flip(0))
    layer.batch_repeat_interleave(2)
    assert layer.states["sum"].shape[0] == layer.keys.shape[0] == 4
    layer.batch_select_indices(torch.tensor([0, 3]))
    assert torch.equal(layer.states["sum"], before.states["sum"].flip(0))


def test_what_a_recurrence_took_in_cannot_be_taken_out() -> None:
    layer = stateful()
    assert not layer.is_croppable
    layer.crop(0)
    for tokens in (-1, 1):
        with pytest.raises(UserError, match="tokens_to_remove must be 0"):
            layer.crop(tokens)
    layer.states.clear()
    assert layer.is_croppable
    with pytest.raises(UserError, match="a negative number"):
        layer.crop(1)
    layer.crop(-2)
    assert layer.get_seq_length() == layer.dense_slots == 3


def test_reset_forgets_and_leaves_forks_alone() -> None:
    layer = stateful()
    fork, keys = layer.fork(), layer.keys.clone()
    layer.reset()
    assert (layer.get_seq_length(), layer.dense_slots, layer.states) == (0, 0, {})
    assert torch.equal(fork.keys, keys)
    fork.states["sum"] = fork.states["sum"] + 1
    x = torch.randn(2, 1, 3, 4)
    assert torch.equal(layer.update(x, x)[0], x)


def test_a_cache_of_states_goes_on_from_a_file(tmp_path) -> None:
    model = tiny_models.decoder("llama")
    attlas.swap(model, "lightning-attention-2", layers=[0])
    cache = DynamicCache()
    with torch.no_grad():
        model(IDS, **with_cache(model, cache))
        save_cache(cache, tmp_path / "cache.safetensors", model)
        loaded = load_cache(tmp_path / "cache.safetensors", model)
        here, there = (model(IDS[:, :1], **with_cache(model, c)).logits for c in (cache, loaded))
    assert torch.equal(here, there)
