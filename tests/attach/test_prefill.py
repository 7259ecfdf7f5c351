"""Prompts that are read in pieces, and new tokens that need no mask to see what came before them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import attlas
import tiny_models
from attlas.attach import attach, prefill
from attlas.attach.part import Part
from attlas.contract.families import FAMILIES, find
from attlas.hf import interface
from attlas.hf.caches import StaticCache, with_cache
from captured_steps import PARTS, parts

TOKENS = 31


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for seven tokens at once."""
    monkeypatch.setattr(prefill, "LEAST", 14)
    monkeypatch.setattr(prefill, "free_bytes", lambda device: 0)


class Lengths(Part):
    """The tokens of each call, and whether more of the prompt comes."""

    whole_prompts = False

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, bool]] = []

    def begin(self, forward_pass: Any) -> None:
        self.seen.append((forward_pass.length, forward_pass.chunked))


def run(model: Any, mask: Any, *given: Part) -> tuple[Any, ...]:
    ids = tiny_models.prompt(2, TOKENS)
    with attach(model, *given, record=["entropy"]) as session, torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        entropy = session["entropy"]
    with attach(model, *given) as session:
        tokens = tiny_models.greedy(model, ids, 4, attention_mask=mask)
    return logits, entropy, torch.tensor(tokens), session.kv_bytes


def padding() -> torch.Tensor:
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, :9] = 0
    return mask


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [n for n in PARTS if n not in ("2 bits", "16 bits")])
def test_pieces_give_what_one_call_gives(name: str, padded: bool, little: None) -> None:
    model, mask = find("llama").model(num_hidden_layers=2).double(), padding() if padded else None
    lengths = Lengths()
    found = run(model, mask, *parts(name, model), lengths)
    assert lengths.seen[:5] == [(6, True)] * 4 + [(7, False)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "free_bytes", lambda device: None)
        expected = run(model, mask, *parts(name, model))
    valid = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(found[0][valid], expected[0][valid], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found[1], expected[1], atol=1e-9, rtol=1e-9)
    assert torch.equal(found[2], expected[2])
    assert found[3] == expected[3]


@pytest.mark.parametrize("family", [each.name for each in FAMILIES])
def test_pieces_of_every_family(family: str, little: None) -> None:
    """Windows, soft caps, latents, shared keys; what reads several tokens once alone is not cut."""
    model, lengths = find(family).model(), Lengths()
    found = run(model, None, lengths)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "free_bytes", lambda device: None)
        expected = run(find(family).model(), None)[0]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    # States of recurrences, and rotations by the length of the text.
    whole = family in ("jamba", "qwen3-next", "phi3-long", "olmo-dynamic")
    assert (lengths.seen[0] == (TOKENS, False)) == whole


def test_calls_that_pieces_would_change_are_not_cut(little: None) -> None:
    model, ids = find("llama").model(num_hidden_layers=2), tiny_models.prompt(2, TOKENS)
    lengths = Lengths()
    triangle = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    with attach(model, lengths):
        model(ids)  # whose gradients are wanted
        with torch.no_grad():
            model(ids, use_cache=False)
            model(ids, attention_mask=triangle)
            model(ids[:, :7])
            static = StaticCache(config=model.config, max_cache_len=40)
            model(ids, **with_cache(model, static))
            model.train()(ids)
            model.eval()
    assert [length for length, _ in lengths.seen] == [TOKENS, TOKENS, TOKENS, 7, TOKENS, TOKENS]


def test_parts_that_may_hang_on_the_call_see_it_whole(little: None) -> None:
    class Own(Lengths):
        whole_prompts = None

    model, ids, own = find("llama").model(num_hidden_layers=2), tiny_models.prompt(2, TOKENS), Own()
    correction = attlas.make("delta-correction", gamma=4)
    with torch.no_grad():
        for given in ([own], [Lengths(), correction]):
            with attach(model, *given):
                model(ids)
            assert given[0].seen == [(TOKENS, False)]


def test_a_user_s_own_chunks_are_cut_likewise(little: None) -> None:
    model, ids = find("llama").model(num_hidden_layers=2), tiny_models.prompt(2, TOKENS)
    lengths = Lengths()
    with attach(model, *parts("snapkv"), lengths, chunked=True) as session, torch.no_grad():
        cache = attlas.hf.caches.cache_of(model(ids[:, :16]))
        assert not cache.layers[0].compressed
        model(ids[:, 16:], **with_cache(model, cache))
        assert not session.cache.layers[0].compressed
        model(ids[:, :1], **with_cache(model, cache))
        assert session.cache.layers[0].compressed
    assert [length for length, _ in lengths.seen] == [5, 5, 6, 5, 5, 5, 1]
    assert all(goes_on for _, goes_on in lengths.seen)


def test_candidates_behind_a_prompt_that_is_cut(little: None) -> None:
    model = find("llama").model(num_hidden_layers=2).double()
    ids = tiny_models.prompt(1, 16).repeat(1, 2)[:, :TOKENS]  # in which candidates are found
    with attach(model, *parts("snapkv")):
        expected = tiny_models.greedy(model, ids, 6)
        lengths = Lengths()
    with attach(model, *parts("snapkv"), lengths):
        found = tiny_models.greedy(model, ids, 6, prompt_lookup_num_tokens=3)
    assert found == expected
    assert [length for length, _ in lengths.seen[:4]] == [10, 10, 11, 3]


def test_an_error_in_a_piece_leaves_nothing_behind(little: None) -> None:
    model, ids = find("llama").model(num_hidden_layers=2).double(), tiny_models.prompt(2, TOKENS)
    calls: list[int] = []

    def fails(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")

    with attach(model, *parts("snapkv")) as session, torch.no_grad():
        handle = model.model.layers[1].register_forward_pre_hook(fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(ids)
        handle.remove()
        assert session.here.until is None
        found = model(ids).logits
    torch.testing.assert_close(found, model(ids).logits, atol=1e-9, rtol=1e-9)


def test_threads_keep_their_pieces_apart(little: None) -> None:
    model = find("llama").model(num_hidden_layers=2).double()
    texts = [tiny_models.prompt(1, TOKENS, seed=seed) for seed in range(6)]
    with torch.no_grad(), ThreadPoolExecutor(3) as pool, attach(model):

        def last(ids: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return model(ids).logits

        found = list(pool.map(last, texts))
    with torch.no_grad():
        for ids, logits in zip(texts, found, strict=True):
            torch.testing.assert_close(logits, model(ids).logits, atol=1e-9, rtol=1e-9)


def test_pieces_are_as_large_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = find("llama").model(num_hidden_layers=2), tiny_models.prompt(2, 1500)
    lengths = Lengths()
    with attach(model, lengths) as session, torch.no_grad():
        each = prefill._live_bytes(session.tower, 4) + prefill._kept_bytes(session.tower, 4)
        whole = 2 * 1500 * each
        for free in (None, whole, whole - 1, 0):
            monkeypatch.setattr(prefill, "free_bytes", lambda device, free=free: free)
            model(ids)
    assert [n for n, _ in lengths.seen] == [1500, 1500, 500, 500, 500, *[250] * 6]


class Live(TorchDispatchMode):
    """The most bytes of tensors that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor):
                memory = x.untyped_storage()
                self._known[memory._cdata] = StorageWeakRef(memory), memory.nbytes()
        self._known = {k: found for k, found in self._known.items() if not found[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._known.values()))
        return out


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("name", ["snapkv", "4 bits"])
def test_compressing_a_prompt_takes_no_second_copy(
    name: str, in_pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peak of a prompt of 3000 tokens is at most 1.05 times that of full attention."""
    monkeypatch.setattr(prefill, "free_bytes", lambda device: 0 if in_pieces else None)
    model = find("llama").model(num_hidden_layers=6, intermediate_size=1024)
    ids, peaks = tiny_models.prompt(1, 3000), []
    for given in ([], parts(name)):
        with Live() as live, attach(model, *given), torch.no_grad():
            model(ids, logits_to_keep=1)
        peaks.append(live.peak)
    assert peaks[1] <= 1.05 * peaks[0]
    if in_pieces:
        with pytest.MonkeyPatch.context() as patch, Live() as live, torch.no_grad():
            patch.setattr(prefill, "free_bytes", lambda device: None)
            model(ids, logits_to_keep=1)
        assert peaks[0] < 0.7 * live.peak


@pytest.mark.parametrize("name", ["none", "recorded", "snapkv", "4 bits"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_new_tokens_of_a_turn_need_no_mask(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of full layers none is made; what they see is what a mask would let them see."""
    made: list[tuple[int, int]] = []
    mask = interface.sdpa_mask

    def counted(**asked: Any) -> Any:
        found = mask(**asked)
        if found is not None and not asked.get("local_size"):
            made.append((asked["q_length"], asked["kv_length"]))
        return found

    monkeypatch.setattr(interface, "sdpa_mask", counted)
    model, ids = find(family).model(), tiny_models.prompt(2, 24)
    chosen = [] if name == "recorded" else parts(name)
    kept = [attlas.make("snapkv", keep=1.0)] if name == "snapkv" else chosen
    record = ["entropy"] if name == "recorded" else []
    with attach(model, *kept, record=record) as session, torch.no_grad():
        cache = attlas.hf.caches.cache_of(model(ids[:, :10]))
        found = model(ids[:, 10:], **with_cache(model, cache)).logits
    assert made == []
    with torch.no_grad():
        expected = model(ids).logits[:, 10:]
    if name != "4 bits":
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert session.cache.get_seq_length() == 24


def test_rooms_of_static_caches_are_no_keys() -> None:
    """Such a cache gives room behind its tokens, and no mask with the first of them."""
    model, ids = find("llama").model(num_hidden_layers=2), tiny_models.prompt(2, 24)
    with torch.no_grad():
        expected = model(ids).logits
        for record in ([], ["entropy"]):
            cache = StaticCache(config=model.config, max_cache_len=40)
            with attach(model, record=record):
                first = model(ids[:, :15], **with_cache(model, cache)).logits
                then = model(ids[:, 15:], **with_cache(model, cache)).logits
            torch.testing.assert_close(torch.cat([first, then], dim=1), expected, atol=2e-5, rtol=1e-4)
