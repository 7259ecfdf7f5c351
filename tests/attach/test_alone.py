"""A decoder of ours that generates by itself captures its steps, and nothing is left behind."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch

import attlas
import tiny_models
from attlas import masks
from attlas.attach import alone, attach, captured, capturing
from attlas.attach.state import ATTACHED
from attlas.errors import UserError
from attlas.hf.caches import cache_of, with_cache


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was captured, by a stand-in for graphs that a CPU has too."""
    found: list[Any] = []

    def recorded(step: Any, device: Any) -> Any:
        found.append(step)
        return step(), step

    monkeypatch.setattr(captured, "recorded", recorded)
    monkeypatch.setattr(capturing, "device_refuses", lambda device: None)
    return found


def decoder(attention: str = "softmax") -> Any:
    torch.manual_seed(0)
    config = attlas.DecoderConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, attention=attention
    )
    return attlas.Decoder(config).eval()


def written(model: Any, **others: Any) -> Any:
    ids = tiny_models.prompt(2, 21)
    return model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0, **others)


@pytest.mark.parametrize("attention", ["softmax", "lightning-attention-2", "multi-head-latent-attention"])
def test_generate_captures_its_steps(attention: str, steps: list[Any]) -> None:
    model = decoder(attention)
    with attach(model, compile=False):
        expected = written(model)
    assert not steps
    assert written(model).equal(expected)
    assert len(steps) == 1
    assert not ATTACHED
    assert written(model, num_beams=3).shape == expected.shape
    kept = cache_of(written(model, return_dict_in_generate=True))
    more = torch.cat([expected, expected[:, :1]], dim=1)
    goes_on = model(more[:, -2:], **with_cache(model, kept), use_cache=True).logits
    torch.testing.assert_close(goes_on, model(more).logits[:, -2:], atol=2e-5, rtol=1e-4)


def test_layers_of_users_say_whether_they_are_roomy(steps: list[Any]) -> None:
    """What counts keys by their number would count those to come."""
    model = decoder()

    class Longer(attlas.Attention):
        def features(self, q: Any, k: Any, inputs: Any) -> Any:
            return q * math.log(k.shape[2] + 1), k

    for layer in model.modules():
        if type(layer) is attlas.Attention:
            layer.__class__ = Longer
    with attach(model) as session:
        written(model)
    assert session.why_not_captured == "Longer in layer 0 does not say that it is roomy"
    Longer.features = lambda self, q, k, inputs: (q * 2.0, k)
    Longer.roomy = True
    with attach(model, compile=False):
        expected = written(model)
    assert written(model).equal(expected)
    assert len(steps) == 1

    class Nearer(attlas.Attention):
        def mask(self, q: Any, k: Any, inputs: Any) -> Any:
            return inputs.within(masks.causal & masks.window(4), q, k)

    for layer in model.modules():
        if type(layer) is Longer:
            layer.__class__ = Nearer
    with attach(model) as session:
        written(model)
    assert session.why_not_captured is not None
    assert session.why_not_captured.startswith("Nearer in layer 0 makes a mask of its own")


def test_a_cpu_has_no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "attach", None)
    assert written(decoder()).shape == (2, 33)


def test_sessions_and_compilers_of_the_user_are_left_alone(steps: list[Any]) -> None:
    model = decoder()
    expected = written(model)
    assert len(steps) == 1
    with attach(model, record=["entropy"]) as session:
        assert written(model).equal(expected)
    assert session["entropy"] is not None
    seen: list[int] = []
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return plain(*args, **kwargs)

    model.forward = forward
    assert written(model).equal(expected)
    assert len(seen) == 12
    del model.forward
    model.model.compile(backend="eager")
    assert written(model).equal(expected)
    assert len(steps) == 1


def test_nothing_stays_when_it_fails(steps: list[Any]) -> None:
    model = decoder()

    def failing(ids: Any, scores: Any) -> Any:
        assert ATTACHED
        with pytest.raises(UserError, match="generates in another thread"), attach(model):
            pass
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(model, logits_processor=[failing])
    assert not ATTACHED
    assert "forward" not in vars(model.model)


def test_threads_share_one_session(steps: list[Any]) -> None:
    model, found = decoder(), {}
    expected = written(model)
    begun, first_is_through = threading.Barrier(2), threading.Event()

    def waiting(number: int) -> Any:
        def processor(ids: Any, scores: Any) -> Any:
            if ids.shape[1] == 21:
                begun.wait(60)
            if number and ids.shape[1] == 28:
                first_is_through.wait(60)
            return scores

        return processor

    def run(number: int) -> None:
        found[number] = written(model, logits_processor=[waiting(number)])
        if not number:
            first_is_through.set()

    threads = [threading.Thread(target=run, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0].equal(expected)
    assert found[1].equal(expected)
    assert len(steps) == 3
    assert not ATTACHED
