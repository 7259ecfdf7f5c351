"""What cannot be honoured is refused by name, and the model is left as it was."""

import pytest
import torch
import transformers
from jaxtyping import config
from torch import nn
from transformers.generation.continuous_batching import PagedAttentionCache

import attlas
import tiny_models
from attlas.attach import Call, ForwardPass, Part, attach
from attlas.cache.prompt import prefill
from attlas.contract.families import find
from attlas.errors import UserError
from attlas.hf.caches import argument, cache_of, with_cache
from attlas.parts.evict.expected_attention import ExpectedAttention
from attlas.parts.evict.key_norm import KeyNorm
from attlas.parts.evict.snapkv import SnapKV
from attlas.parts.evict.streaming_llm import StreamingLLM


@pytest.fixture
def model():
    return tiny_models.decoder("llama")


def refused(model, match, *parts, call, error=UserError, **options):
    with pytest.raises(error, match=match), attach(model, *parts, **options):
        call(model)
    assert model.config._attn_implementation == "sdpa"
    assert "attlas" not in transformers.AttentionInterface()


IDS = tiny_models.prompt(1, 20)


def test_calls(model):
    class Change(Part):
        def score_mod(self, call):
            return lambda s, b, h, q, k: s + 1

    static = transformers.StaticCache(config=model.config, max_cache_len=40)
    offloaded = transformers.DynamicCache(config=model.config)
    offloaded.offloading = True  # what offloading=True sets, which also wants an accelerator
    filled = cache_of(model(IDS))
    refused(model, "output_attentions", call=lambda m: m(IDS, output_attentions=True))
    refused(model, "cu_seq_lens_q", call=lambda m: m(IDS, cu_seq_lens_q=torch.tensor([0, 20])))
    refused(model, "kernel_options", call=lambda m: m(IDS, kernel_options={"BLOCK_M": 16}))
    refused(model, "StaticCache", KeyNorm(0.7), call=lambda m: m(IDS, **with_cache(m, static)))
    refused(model, "offloaded", KeyNorm(0.7), call=lambda m: m(IDS, **with_cache(m, offloaded)))
    refused(model, "20 tokens", KeyNorm(0.7), call=lambda m: m(IDS, **with_cache(m, filled)))
    refused(model, "use_cache", KeyNorm(0.7), call=lambda m: m(IDS, use_cache=False))
    four = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    refused(model, "2-D", KeyNorm(0.7), call=lambda m: m(IDS, attention_mask=four))
    refused(model, "boolean", Change(), call=lambda m: m(IDS, attention_mask=four.float()))
    refused(model, r"model\(\.\.\.\)", Change(), call=lambda m: m.model.forward(IDS))


def test_positions_of_several_axes():
    x = torch.zeros(1, 2, 20, 16)
    step = ForwardPass(positions=torch.arange(20).expand(3, 1, 20), length=20)
    with pytest.raises(UserError, match="3 dimensions"):
        _ = Call(0, nn.Identity(), x, x, x, 1.0, None, step).positions


def test_dropout_with_changed_scores():
    class Change(Part):
        def score_mod(self, call):
            return lambda s, b, h, q, k: s + 1

    options = find("llama").config()
    options.attention_dropout = 0.5
    model = transformers.LlamaForCausalLM(options).train()
    refused(model, "dropout", Change(), call=lambda m: m(IDS))


def test_paged_cache(model):
    """Continuous batching keeps its own list of attention functions, and ours is not on it."""
    paged = object.__new__(PagedAttentionCache)
    refused(model, "PagedAttentionCache", call=lambda m: m(IDS, cache=paged))
    refused(model, "paged", call=lambda m: m(IDS, **{argument(type(m)): paged}))


@pytest.fixture
def unchecked():
    """As users have it: without the type checks that run in tests."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def test_things_that_are_no_parts(model, unchecked):
    with pytest.raises(TypeError, match=r"attlas\.make"):
        attach(model, "snapkv")
    with pytest.raises(UserError, match="pooling"):
        SnapKV(0.5, pooling="sum")
    with pytest.raises(TypeError, match="write"):
        attach(model, record="entropy")
    with pytest.raises(ValueError, match="did you mean 'entropy'"):
        attach(model, record=["entropi"])
    with pytest.raises(TypeError, match="recorders"):
        attach(model, record=[KeyNorm(0.5)])
    with pytest.raises(TypeError, match="Transformers model"):
        attach(nn.Linear(2, 2))


def test_parts(model):
    with pytest.raises(UserError, match="SnapKV and KeyNorm"):
        attach(model, SnapKV(0.5), KeyNorm(0.5))
    with attach(model), pytest.raises(UserError, match="already"), attach(model):
        pass
    with attach(model), pytest.raises(UserError, match="already"), attach(model.model):
        pass
    assert model.config._attn_implementation == "sdpa"


def test_models():
    t5 = transformers.T5Config(
        vocab_size=97, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16
    )
    with pytest.raises(UserError, match="encoder-decoder"):
        attach(transformers.T5ForConditionalGeneration(t5), record=["entropy"]).__enter__()
    everywhere = tiny_models.decoder("mistral-window")
    with pytest.raises(UserError, match="full-attention"):
        attach(everywhere, KeyNorm(0.5)).__enter__()
    sizes = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
    model = transformers.GPTJForCausalLM(transformers.GPTJConfig(**sizes))
    with pytest.raises(UserError, match=r"ExpectedAttention un-rotates .* GPTJForCausalLM rotates"):
        attach(model, ExpectedAttention(0.5)).__enter__()


def test_a_model_that_cannot_be_intercepted(model, monkeypatch):
    """Transformers looks for its own interface in a model's source, and warns when it is not there."""
    monkeypatch.setattr(type(model.model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(UserError, match="AttentionInterface"):
        attach(model).__enter__()
    assert model.config._attn_implementation == "sdpa"
    assert not model.model._forward_pre_hooks


def test_budgets(model):
    for budget in ({}, {"keep": 0.5, "tokens": 3}, {"keep": 0.0}, {"keep": 1.5}, {"tokens": 0}):
        with pytest.raises(UserError, match=r"keep|tokens|bytes"):
            KeyNorm(**budget)
    refused(model, "window=32 of SnapKV", SnapKV(tokens=10), call=lambda m: m(IDS))
    refused(model, "sinks=12", StreamingLLM(0.25, sinks=12), call=lambda m: m(IDS))
    refused(model, "2 layers kept whole", KeyNorm(0.4), call=lambda m: m(IDS))
    refused(model, "skip_layers", KeyNorm(0.4, skip_layers=(7,)), call=lambda m: m(IDS))
    refused(model, "no layer", KeyNorm(0.4, skip_layers=range(4)), call=lambda m: m(IDS))
    refused(model, "bytes=10 ", KeyNorm(bytes=10), call=lambda m: m(IDS))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("snapkv", {"kernel": 4}), ("snapkv", {"window": 0}),
        ("streaming-llm", {"sinks": -1}), ("expected-attention", {"n_future": 0}),
        ("expected-attention", {"sinks": -1}),
    ],
)  # fmt: skip
def test_options(name, options):
    with pytest.raises(UserError, match=next(iter(options))):
        attlas.make(name, keep=0.5, **options)


def test_recorder_options():
    with pytest.raises(UserError, match="sinks"):
        attlas.make("sink-mass", sinks=0)
    with pytest.raises(UserError, match="k must"):
        attlas.make("top-links", k=0)


def test_prefill(model):
    with pytest.raises(UserError, match="chunk"):
        prefill(model, IDS, chunk=0)
    with pytest.raises(UserError, match="no token"):
        prefill(model, IDS[:, :0])
    with pytest.raises(UserError, match="did not see"):
        prefill(model, IDS).fork(KeyNorm(0.5))
    mask = torch.ones_like(IDS)
    mask[:, -2:] = 0
    with pytest.raises(UserError, match="left"):
        prefill(model, IDS, attention_mask=mask)
