"""Every kind of cache layer: copied, counted, read in place of another, or refused on entering."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import attlas
import tiny_models
from attlas.attach import Part, attach
from attlas.cache import prefill
from attlas.contract.families import SIZES, distinct, find
from attlas.errors import UserError
from attlas.hf.caches import cache_of, with_cache
from attlas.storage import load_cache, save_cache

IDS = tiny_models.prompt(1, 30)
#: One family of each way in which a cache may hold what attention reads.
KINDS = distinct("full", "windows", "sinks", "soft-caps", "states", "latents", "shared-keys", "layouts")
FULL = [kind for kind in KINDS if "full" in find(kind).traits]
#: Parts with which nothing is dropped, rounded or left unread.
NOTHING = {
    "snapkv": {"keep": 1.0, "window": 4},
    "streaming-llm": {"keep": 1.0},
    "quantized-cache": {"bits": 16, "recent": 4, "key_group": 8},
    "quest-page-selection": {"keep": 1.0, "page": 4},
}


def stepped(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits of three tokens, one by one, and of a question of three more."""
    found = [model(ids[:, t : t + 1], **with_cache(model, cache)).logits for t in range(3)]
    return torch.cat([*found, model(ids[:, 3:6], **with_cache(model, cache)).logits], dim=1)


def continued(model: Any) -> Tensor:
    """Logits of a prompt, of steps and of a question behind it."""
    with torch.no_grad():
        out = model(IDS[:, :24], use_cache=True)
        return torch.cat([out.logits, stepped(model, IDS[:, 24:], cache_of(out))], dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_forks_are_equal_and_leave_the_prompt_alone(kind: str) -> None:
    model = tiny_models.decoder(kind)
    plain = continued(model)[:, 24:]
    with torch.no_grad():
        prompt = prefill(model, IDS[:, :20]).extend(model, IDS[:, 20:24])
        for _ in range(2):
            with attach(model):
                found = stepped(model, IDS[:, 24:], prompt.fork())
            torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.parametrize("kind", FULL)
def test_parts_that_change_nothing_change_nothing(kind: str, name: str) -> None:
    """In a session and on a fork; or they are refused on entering."""
    model = tiny_models.decoder(kind)
    part = attlas.make(name, **NOTHING[name])
    if "latents" in find(kind).traits and not part.latents:
        with pytest.raises(UserError, match="DeepseekV3Attention"), attach(model, part):
            pass
        return
    plain = continued(model)
    with attach(model, part):
        torch.testing.assert_close(continued(model), plain, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        prompt = prefill(model, IDS[:, :24], [part])
        with attach(model, part):
            found = stepped(model, IDS[:, 24:], prompt.fork(part))
    torch.testing.assert_close(found, plain[:, 24:], rtol=1e-4, atol=1e-4)


class Hidden(Part):
    """Hides columns 4 to 15 from the tokens behind the prompt."""

    def mask(self, call: Any) -> Tensor:
        columns = torch.arange(call.k.shape[2])
        if call.original_positions is not None:
            columns = call.original_positions[0, 0]
        return ~((columns >= 4) & (columns < 16) & (call.queries[:, None] >= 24))[None, None]


@pytest.mark.parametrize("kind", [k for k in FULL if not {"windows"} & find(k).traits])
def test_dropped_tokens_are_as_hidden_ones(kind: str) -> None:
    model = tiny_models.decoder(kind)
    with attach(model, Hidden()):
        hidden = continued(model)
    with attach(model, attlas.make("streaming-llm", tokens=12)):
        torch.testing.assert_close(continued(model), hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", [None, "streaming-llm", "quantized-cache"])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_memory_that_is_kept(kind: str, part: str | None) -> None:
    model, ids = tiny_models.decoder(kind), tiny_models.prompt(1, 200)
    options = {"streaming-llm": {"tokens": 20}, "quantized-cache": {"key_group": 8, "recent": 8}}
    if part is not None and "full" not in find(kind).traits:
        pytest.skip("no layer grows")
    parts = [] if part is None else [attlas.make(part, **options[part])]
    with torch.no_grad(), attach(model, *parts) as session:
        model(ids, use_cache=True)
        for _ in range(3):
            held = sum({x.data_ptr(): x.nbytes() for x in storages(session.cache.layers)}.values())
            assert held <= session.kv_bytes * 1.02
            assert session.kv_bytes <= held * 1.1  # room that is made, and numbers kept by heads
            model(ids[:, :1], **with_cache(model, session.cache))


def storages(held: Any) -> Iterator[torch.UntypedStorage]:
    """The memory of all that is reached from a cache's layers."""
    if isinstance(held, Tensor):
        if held.ndim > 1:
            yield held.untyped_storage()
    elif isinstance(held, dict):
        for each in held.values():
            yield from storages(each)
    elif isinstance(held, (list, tuple)):
        for each in held:
            yield from storages(each)
    elif hasattr(held, "__dict__") and not isinstance(held, (nn.Module, type)):
        yield from storages(vars(held))


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_weights_are_the_models_own(kind: str) -> None:
    """Also once windows have moved on, and in layers that read the keys of others."""
    model = tiny_models.decoder(kind, "eager")
    with torch.no_grad():
        whole = model(IDS, output_attentions=True, use_cache=False).attentions
        with attach(model, record=["weights"]) as session:
            cache = cache_of(model(IDS[:, :20], use_cache=True))
            for t in range(20, 30):
                model(IDS[:, t : t + 1], **with_cache(model, cache))
    found = session["weights"]
    eager = torch.stack([w for w in whole if w is not None])
    torch.testing.assert_close(found, eager[..., :30], rtol=1e-4, atol=1e-5)


def test_the_last_logits_of_layers_that_share_keys() -> None:
    """Such layers are given the tokens alone whose logits are asked for, with causality left out."""
    for kind in distinct(having=["shared-keys"]):
        model = tiny_models.decoder(kind)
        parts = (Part(), attlas.make("streaming-llm", tokens=12))
        with torch.no_grad():
            plain = model(IDS).logits[:, -3:]
            for attached in ((), parts[:1], parts[1:]):
                with attach(model, *attached):
                    found = model(IDS, logits_to_keep=3, use_cache=True).logits
                torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def test_keys_that_the_model_chose_are_the_only_ones_read() -> None:
    """DeepSeek-V3.2 gives attention functions it does not know the slots that its indexer chose."""
    torch.manual_seed(0)
    config = hf.DeepseekV32Config(
        **{**find("deepseek-v3").options, **SIZES, "num_key_value_heads": 4},
        index_head_dim=16, index_n_heads=2, index_topk=8,
    )  # fmt: skip
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.2)
    plain = continued(model)
    for parts in ((), (Part(),)):
        with attach(model, *parts):
            torch.testing.assert_close(continued(model), plain, rtol=1e-4, atol=1e-4)


def test_models_that_remember_in_their_modules_are_no_prompts() -> None:
    config = hf.RecurrentGemmaConfig(**SIZES, attention_window_size=8)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UserError, match="RecurrentGemmaForCausalLM cannot be forked"):
        prefill(model, IDS)


def test_a_cache_of_the_models_own_is_forked_and_not_worked_on() -> None:
    torch.manual_seed(0)
    config = hf.MiniMaxConfig(**SIZES, head_dim=16, num_local_experts=2, block_size=8)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    part = attlas.make("snapkv", keep=0.5)
    for use in (lambda: attach(model, part).__enter__(), lambda: prefill(model, IDS, [part])):
        with pytest.raises(UserError, match="no cache but its own MiniMaxCache"):
            use()
    with torch.no_grad():
        prompt = prefill(model, IDS[:, :24])
        first, second = (stepped(model, IDS[:, 24:], prompt.fork()) for _ in range(2))
    torch.testing.assert_close(first, continued(model)[:, 24:], rtol=1e-4, atol=1e-4)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        (hf.DiffLlamaConfig, {}, "DiffLlamaAttention.* to a part of what it caches"),
        (hf.HrmTextConfig, {}, "HrmTextAttention.* fills several layers"),
        (hf.JetMoeConfig, {"kv_channels": 16}, "JetMoeAttention.* something else"),
    ],
    ids=["parts", "turns", "repeated"],
)  # fmt: skip
def test_layers_that_read_otherwise_than_they_cache_are_refused(
    kind: Any, options: dict[str, Any], why: str
) -> None:
    model = hf.AutoModelForCausalLM.from_config(kind(**SIZES, **options))
    with pytest.raises(UserError, match=why), attach(model, attlas.make("snapkv", keep=0.5)):
        pass


@pytest.mark.parametrize("kind", FULL)
def test_prompts_go_on_from_a_file(kind: str, tmp_path: Any) -> None:
    model = tiny_models.decoder(kind)
    with torch.no_grad():
        prompt = prefill(model, IDS[:, :24])
        save_cache(prompt.fork(), tmp_path / "cache", model)
        with attach(model):
            here = stepped(model, IDS[:, 24:], prompt.fork())
            there = stepped(model, IDS[:, 24:], load_cache(tmp_path / "cache", model))
    assert torch.equal(here, there)
