"""Families of models: their traits are true, and tests that select by traits get what is new to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from attlas.cache.rotations import look, rotation_of
from attlas.contract import families
from attlas.contract.families import FAMILIES, TRAITS, Family, distinct, find
from attlas.errors import UnknownName
from attlas.hf.caches import cache_of
from attlas.hf.sources import shared_keys
from attlas.storage.rotary import Rotation


def rotations(model: Any) -> list[Rotation | None]:
    """How the layers that cache keys of their own rotate them."""
    look(model)
    layers = DynamicCache(config=model.config).layers
    borrowed = set(shared_keys(model))
    keys = [i for i, x in enumerate(layers) if not hasattr(x, "recurrent_states") and i not in borrowed]
    latent = getattr(model.config, "kv_lora_rank", None)
    return [] if latent else [rotation_of(model, i, "a test") for i in keys]


def traits_of(family: Family) -> set[str]:
    """What the model itself says."""
    model = family.model()
    config, weights = model.config, dict(model.named_parameters())
    frequencies = [b for name, b in model.named_buffers() if name.endswith("inv_freq")]
    width = config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    layers = DynamicCache(config=config).layers
    keys = [layer for layer in layers if isinstance(layer, CacheLayerMixin)]
    sliding = {bool(layer.is_sliding) for layer in keys}
    found = rotations(model)
    with torch.no_grad():
        cached = cache_of(model(torch.tensor([[3, 4, 5]]), use_cache=True)).layers
    widths = {x.shape[-1] for layer in cached if (x := getattr(layer, "keys", None)) is not None}
    projections = ("k_proj.bias", "query_key_value.bias", "c_attn.bias")
    says = {
        "rotary": bool(frequencies),
        "partial-rotary": any(2 * f.numel() < width for f in frequencies),
        "paired-rotary": any(r is not None and r.order is not None for r in found),
        "varying-rotary": any(r is not None and r.varies for r in found),
        "growing-rotary": "dynamic" in str(getattr(config, "rope_parameters", None)),
        "some-rotary": any(found) and not all(found),
        "grouped": kv_heads < config.num_attention_heads,
        "full": False in sliding,
        "windows": True in sliding,
        "soft-caps": getattr(config, "attn_logit_softcapping", None) is not None,
        "sinks": any("sinks" in name for name in weights),
        "key-norm": any("k_norm" in name for name in weights),
        "biases": any(name.endswith(projections) for name in weights),
        "states": any(hasattr(layer, "recurrent_states") for layer in layers),
        "latents": bool(getattr(config, "kv_lora_rank", None)) and config.kv_lora_rank in widths,
        "shared-keys": bool(shared_keys(model)),
        "layouts": len(widths) > 1,
    }
    assert set(says) == set(TRAITS)
    return {trait for trait, so in says.items() if so}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_traits_are_true(family: Family) -> None:
    assert traits_of(family) == family.traits
    assert find(family.name) is family


def test_one_family_of_each_combination() -> None:
    assert distinct() == ["llama"]
    assert distinct("soft-caps", "sinks") == ["llama", "gemma2", "gpt-oss"]
    assert distinct("windows", having=["full"], lacking=["soft-caps"]) == ["llama", "gemma3"]
    assert distinct(*TRAITS) == [f.name for f in FAMILIES if f.name != "mistral"]  # llama's twin


def test_a_new_family_is_picked_up_where_it_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Family("both", "LlamaConfig", frozenset({"rotary", "full", "sinks", "soft-caps"}))
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, both))
    assert distinct("soft-caps", "sinks")[-1] == "both"
    assert "both" not in distinct("rotary", "windows")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownName, match="did you mean 'windows'"):
        distinct("window")
    with pytest.raises(UnknownName, match="unknown trait of models"):
        distinct(having=["nonsense"])
    with pytest.raises(UnknownName, match="did you mean 'gemma2'"):
        find("gemma-2")
