"""Captured steps give what eager ones give; here what is recorded is Python that counts nothing.

A CPU has no graphs. What stands in for one runs the recorded function again: it sees the twins alone,
in which nothing that Python counts moves, so that a number that should have come from the device is as
stale as it would be in a graph.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import attlas
import tiny_models
from attlas.attach import attach, captured, capturing
from attlas.contract.families import FAMILIES, find
from attlas.errors import UserError
from attlas.hf.caches import with_cache
from attlas.storage import seat
from attlas.storage.plain import forked
from captured_steps import OURS, PARTS, decoded, llama, parts


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "recorded", lambda step, device: (step(), step))
    monkeypatch.setattr(capturing, "device_refuses", lambda device: None)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_the_steps_are_the_eager_ones(name: str, padded: bool) -> None:
    model = llama()
    ids, mask = tiny_models.prompt(3, 33), None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, :7] = 0
        mask[2, :20] = 0
    eager, expected = decoded(model, name, 40, False, ids, mask)
    session, found = decoded(model, name, 40, "auto", ids, mask)
    assert session.why_not_captured is None
    assert eager.why_not_captured == "compile=False"
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    for ours, theirs in zip(session.cache.layers, eager.cache.layers, strict=True):
        assert ours.get_seq_length() == theirs.get_seq_length()
        if name != "none":
            assert ours.dense_slots == theirs.dense_slots
            torch.testing.assert_close(ours.read()[0], theirs.read()[0], atol=1e-9, rtol=1e-9)
    assert session.read_bytes == pytest.approx(eager.read_bytes, rel=0.2)


#: Of the families the reasons for which steps are not captured.
LEFT = {
    "phi3-long": "rotations of type 'longrope' look at how long the text is",
    "olmo-dynamic": "rotations of type 'dynamic' look at how long the text is",
}


@pytest.mark.parametrize("family", [each.name for each in FAMILIES])
def test_families_are_captured_or_say_why(family: str) -> None:
    """The second time with a fork on the way, which has states and windows of its own."""
    ids = tiny_models.prompt(2, 21)
    for change in (None, gone_on_by_a_fork({})):
        runs = []
        for compile in (False, "auto"):  # each by a model of its own: rotations may change with the text
            model = find(family).model()
            runs.append(decoded(model, "none", 18, compile, ids, change=change))
        torch.testing.assert_close(runs[1][1], runs[0][1], atol=2e-5, rtol=1e-4)
        assert runs[1][0].why_not_captured == LEFT.get(family)


def gone_on_by_a_fork(kept: dict[str, Any]) -> Any:
    """From step 14 on the fork of step 8, which is behind by six tokens."""

    def change(step: int, cache: Any) -> Any:
        if step == 8:
            kept["fork"] = forked(cache)
        return kept["fork"] if step == 14 else cache

    return change


@pytest.mark.parametrize("name", OURS)
def test_decoders_of_ours(name: str) -> None:
    torch.manual_seed(0)
    config = attlas.DecoderConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, attention=name
    )
    model = attlas.Decoder(config).eval()
    ids = tiny_models.prompt(2, 21)
    expected = decoded(model, "none", 14, False, ids)[1]
    session, found = decoded(model, "none", 14, "auto", ids)
    assert session.why_not_captured == OURS[name]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [
    {"attention": {"name": "window", "size": 5}, "position": "alibi"},
    {"attention": ["softmax", {"name": "window", "size": 9}]}, {"position": "t5"},
    {"attention": {"name": "strided", "stride": 3}},
])  # fmt: skip
def test_what_is_seen_and_weighed_by_position(options: dict[str, Any], padded: bool) -> None:
    torch.manual_seed(0)
    config = attlas.DecoderConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        **options,
    )  # fmt: skip
    model, ids = attlas.Decoder(config).eval().double(), tiny_models.prompt(2, 21)
    mask = torch.ones_like(ids) if padded else None
    if mask is not None:
        mask[0, :7] = 0
    expected = decoded(model, "none", 20, False, ids, mask)[1]
    session, found = decoded(model, "none", 20, "auto", ids, mask)
    assert session.why_not_captured is None
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", PARTS)
def test_beams_are_moved_where_they_lie(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, answers, made = llama(), tiny_models.prompt(2, 25), [], []

    def recorded(step: Any, device: Any) -> Any:
        made.append(step)
        return step(), step

    monkeypatch.setattr(captured, "recorded", recorded)
    for compile in (False, "auto"):
        with attach(model, *parts(name, model), compile=compile) as session:
            answers.append(model.generate(ids, num_beams=3, max_new_tokens=20, do_sample=False))
    assert answers[0].equal(answers[1])
    if name == "ada-kv":  # heads of unequal lengths lie in one flat buffer
        assert session.why_not_captured == "what the cache holds is moved at every step"
    else:
        assert session.why_not_captured is None
        assert len(made) == 1


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt-oss"])
def test_beams_over_windows_and_soft_caps(family: str) -> None:
    ids, answers = tiny_models.prompt(2, 25), []
    for compile in (False, "auto"):
        model = find(family).model()
        with attach(model, *parts("snapkv"), compile=compile) as session:
            answers.append(model.generate(ids, num_beams=2, max_new_tokens=16, do_sample=False))
    assert session.why_not_captured is None
    assert answers[0].equal(answers[1])


@pytest.mark.parametrize("name", ["none", "snapkv", "4 bits", "quest"])
def test_beams_leave_a_fork_as_it_was(name: str) -> None:
    model, ids = llama(), tiny_models.prompt(2, 30)
    kept: dict[str, Any] = {}

    def change(step: int, cache: Any) -> Any:
        if step == 8:
            kept["fork"] = forked(cache)
        if step == 10:
            cache.reorder_cache(torch.tensor([1, 0]))
        return kept["fork"] if step == 14 else cache

    expected = decoded(model, name, 20, False, ids, change=change)[1]
    found = decoded(model, name, 20, "auto", ids, change=change)[1]
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("family", "name"), [
    ("gemma2", "none"), ("gemma2", "snapkv"), ("gemma3n", "none"), ("gemma3n", "snapkv"),
    ("deepseek-v3", "none"),
])  # fmt: skip
def test_soft_caps_latents_and_shared_keys(family: str, name: str, padded: bool) -> None:
    model, ids = find(family).model(), tiny_models.prompt(3, 33)
    latents = family == "deepseek-v3"  # whose experts are no products of float64
    model = model if latents else model.double()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    given = mask if padded else None
    expected = decoded(model, name, 40, False, ids, given)[1]
    session, found = decoded(model, name, 40, "auto", ids, given)
    reason = "layer 0 of the cache is a sliding window over padded rows"
    assert session.why_not_captured == (reason if padded and not latents else None)
    bound = 2e-5 if latents else 1e-9
    torch.testing.assert_close(found, expected, atol=bound, rtol=bound)


def test_room_that_runs_out_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seat, "WHOLE", 4)
    monkeypatch.setattr(seat, "LEAST", 3)
    made = []

    def recorded(step: Any, device: Any) -> Any:
        made.append(step)
        return step(), step

    monkeypatch.setattr(captured, "recorded", recorded)
    model = llama()
    for name in ("none", "4 bits", "quest"):
        made.clear()
        expected = decoded(model, name, 30, False, tiny_models.prompt(1, 20))[1]
        session, found = decoded(model, name, 30, "auto", tiny_models.prompt(1, 20))
        assert session.why_not_captured is None
        assert len(made) > 3
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", ["none", "snapkv", "4 bits", "quest"])
def test_forks_and_tokens_taken_back(name: str) -> None:
    model = llama()
    kept = {}

    def change(step: int, cache: Any) -> Any:
        if step == 8:
            kept["fork"], kept["cache"] = forked(cache), cache
        if step == 14:  # the fork goes on from where it was made
            return kept["fork"]
        if step == 20:
            return kept["cache"]
        if step == 25 and name in ("none", "snapkv"):
            cache.crop(-2)
        return cache

    ids = tiny_models.prompt(2, 30)
    expected = decoded(model, name, 32, False, ids, change=change)[1]
    session, found = decoded(model, name, 32, "auto", ids, change=change)
    assert session.why_not_captured is None
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_generate_and_several_turns() -> None:
    model = llama()
    ids = tiny_models.prompt(2, 24)
    for name in ("none", "snapkv", "4 bits", "quest"):
        answers = []
        for compile in (False, "auto"):
            with attach(model, *parts(name), compile=compile) as session:
                first = model.generate(ids, max_new_tokens=12, do_sample=False)
                more = torch.cat([first, tiny_models.prompt(2, 5)], dim=1)
                cache = session.cache
                second = model.generate(
                    more, attention_mask=torch.ones_like(more), max_new_tokens=12, do_sample=False,
                    **with_cache(model, cache),
                )  # fmt: skip
            answers.append(second)
        assert answers[0].equal(answers[1])


def test_what_a_step_does_in_python_is_not_captured() -> None:
    model = llama()
    ids = tiny_models.prompt(1, 20)
    seen = []
    hook = model.model.layers[1].mlp.register_forward_hook(lambda *given: seen.append(1))
    session, _ = decoded(model, "none", 6, "auto", ids)
    hook.remove()
    assert session.why_not_captured == "hooks are on LlamaMLP"
    assert len(seen) == 7
    with torch.no_grad(), attach(model, record=["entropy"]) as session:
        model.generate(ids, max_new_tokens=5)
    assert "works in Python" in session.why_not_captured
    with pytest.raises(UserError, match="compile=True cannot be honoured: Entropy works"):
        attach(model, record=["entropy"], compile=True).__enter__()
    with pytest.raises(UserError, match="compile is True, False or 'auto', got 3"):
        attach(model, compile=3)


def test_embeddings_and_masks_pair_by_pair() -> None:
    model = llama()
    ids, given = tiny_models.prompt(2, 30), []
    for compile in (False, "auto"):
        with torch.no_grad(), attach(model, compile=compile) as session:
            model(ids[:, :20], use_cache=True)
            steps = []
            for at in range(20, 30):
                cache = with_cache(model, session.cache)
                if at < 26:
                    told = {"inputs_embeds": model.get_input_embeddings()(ids[:, at : at + 1])}
                else:  # a token that sees nothing of the beginning
                    told = {"input_ids": ids[:, at : at + 1]}
                    told["attention_mask"] = torch.arange(at + 1).expand(2, 1, 1, -1) > 7
                steps.append(model(**told, **cache).logits)
                if compile and at == 25:
                    assert session.why_not_captured is None
            given.append(torch.stack(steps))
    assert session.why_not_captured == "the attention_mask is no 2-D tensor"
    torch.testing.assert_close(given[1], given[0], atol=1e-9, rtol=1e-9)


def test_a_prompt_that_ends_in_a_chunk_of_one_token() -> None:
    model, ids = llama(), tiny_models.prompt(2, 25)
    for name in ("snapkv", "4 bits", "quest"):
        found = []
        for compile in (False, "auto"):
            with attach(model, *parts(name), compile=compile) as session:
                found.append(model.generate(
                    ids, max_new_tokens=12, do_sample=False, prefill_chunk_size=8
                ))  # fmt: skip
        assert session.why_not_captured is None
        assert found[0].equal(found[1])


def test_padded_rows_without_positions() -> None:
    """A model may count them by its mask."""
    model, ids = llama(), tiny_models.prompt(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad(), attach(model) as session:
        model(ids, attention_mask=mask, use_cache=True)
        for _ in range(5):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
            model(ids[:, :1], attention_mask=mask, **with_cache(model, session.cache))
    assert session.why_not_captured == "rows are padded, and position_ids are not given"


def test_weights_that_are_replaced_are_seen() -> None:
    model = llama()

    def change(step: int, cache: Any) -> Any:
        if step == 9:
            weight = model.model.layers[0].mlp.up_proj.weight
            weight.data = weight.data.roll(1, 0).clone()
        return cache

    before = [p.detach().clone() for p in model.parameters()]
    found = []
    for compile in (False, "auto"):
        for p, old in zip(model.parameters(), before, strict=True):
            p.data = old.clone()
        found.append(decoded(model, "none", 14, compile, tiny_models.prompt(1, 20), change=change)[1])
    torch.testing.assert_close(found[1], found[0], atol=1e-9, rtol=1e-9)


def test_a_capture_that_fails_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    why = "operation not permitted when stream is capturing"
    calls: list[Any] = []

    def fails(step: Any, device: Any) -> Any:
        calls.append(step)
        if len(calls) % 2:  # in the step itself
            raise RuntimeError(f"{why}\nmore")
        return step(), why

    monkeypatch.setattr(captured, "recorded", fails)
    model = llama()
    ids = tiny_models.prompt(2, 20)
    for name in ("none", "none", "snapkv", "snapkv", "4 bits", "4 bits"):
        expected = decoded(model, name, 10, False, ids)[1]
        session, found = decoded(model, name, 10, "auto", ids)
        assert session.why_not_captured == why
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    with pytest.raises(UserError, match="compile=True cannot be honoured: operation not permitted"):
        decoded(model, "none", 10, True, ids)


def test_fused_steps_are_the_eager_ones() -> None:
    """One program for all layers, by the compiler's own interpreter of graphs."""
    model = find("llama").model(num_hidden_layers=6)
    expected = decoded(model, "4 bits", 8, False, tiny_models.prompt(2, 20))[1]
    counted = CompileCounter()
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        compile = torch.compile
        patch.setattr(torch, "compile", lambda f, options, **how: compile(f, backend=counted, **how))
        session, found = decoded(model, "4 bits", 8, True, tiny_models.prompt(2, 20))
    assert session.why_not_captured is None
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert 0 < counted.frame_count < 10
