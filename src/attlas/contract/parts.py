"""The checks of parts: attached to a small random Llama, they work, keep their word, and leave."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attlas.contract.families import find
from attlas.contract.measure import Measure, Subject, check, distance, finite, holds, refuses, same
from attlas.contract.networks.state import surroundings

#: Options that say how large a budget is; checks that set one leave the example's out.
BUDGETS = ("keep", "tokens", "bytes")


def is_policy(subject: Subject) -> bool:
    """Whether the part decides which keys a cache keeps."""
    from attlas.cache.policy import CachePolicy

    return inspect.isclass(subject.object) and issubclass(subject.object, CachePolicy)


def is_cache_part(subject: Subject) -> bool:
    """Whether the part deals with what a cache holds, or with what a step reads of it."""
    from attlas.cache.part import CachePart

    return inspect.isclass(subject.object) and issubclass(subject.object, CachePart)


def changes_nothing(subject: Subject) -> bool:
    """Whether there are options, said by the part, with which it changes nothing."""
    return is_cache_part(subject) and subject.object.everything is not None


def reads_prompts(subject: Subject) -> bool:
    """Whether what the part does to a prompt could hang on padding."""
    from attlas.attach.part import Recorder, Selector
    from attlas.cache.part import CachePart

    kinds = (CachePart, Recorder, Selector)
    return inspect.isclass(subject.object) and issubclass(subject.object, kinds)


def is_recorder(subject: Subject) -> bool:
    """Whether the part looks and changes nothing."""
    from attlas.attach import Recorder

    return inspect.isclass(subject.object) and issubclass(subject.object, Recorder)


def leaves_prompt(subject: Subject) -> bool:
    """Whether the prompt's own attention stays the model's."""
    exact = is_cache_part(subject) and subject.object.exact_prefill
    return exact or is_recorder(subject)


def made(subject: Subject, **options: object) -> Any:
    """The part, with the example's budget unless the options set another."""
    example = dict(subject.example)
    if any(name in options for name in BUDGETS):
        example = {name: value for name, value in example.items() if name not in BUDGETS}
    return calibrated(subject.object(**{**example, **options}))


def calibrated(part: Any) -> Any:
    """The part, with statistics of the small Llama where it needs some and has none."""
    from attlas.calibration import Calibrated, calibrate

    if isinstance(part, Calibrated) and part.calibration is None:
        with torch.random.fork_rng(devices=[]):
            texts = [prompt(96, seed=seed) for seed in (2, 3)]
            part.calibration = calibrate(small_llama(), part, texts)
    return part


def small_llama(dtype: torch.dtype = torch.float64, layers: int = 6) -> Any:
    """A Llama with random weights: 4 query heads over 2 key heads of width 8."""
    from attlas.hf.models import LlamaForCausalLM

    torch.manual_seed(0)
    config = find("llama").config(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def prompt(tokens: int, batch: int = 1, seed: int = 1) -> Tensor:
    """Token numbers, none of them padding."""
    torch.manual_seed(seed)
    return torch.randint(2, 64, (batch, tokens))


def continued(model: Any, ids: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
    """Logits of six greedily generated tokens, [steps, batch, vocabulary]."""
    mask = torch.ones_like(ids) if mask is None else mask
    given = {"max_new_tokens": 6, "do_sample": False, **options}
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        return_dict_in_generate=True,
        output_logits=True,
        **given,
    )
    return torch.stack(out.logits)


@check("part", poisoned=False)
def no_trace(subject: Subject) -> Iterator[Measure]:
    """Entered and left, by the end or by an exception, the model and the libraries are as before."""
    from attlas.attach import attach

    model, ids = small_llama(), prompt(24)
    with torch.no_grad():
        plain, before = model(ids).logits, _model_state(model)
        around = surroundings()
        with attach(model, made(subject)):
            model(ids)
        for case in ("left", "left by an exception"):
            yield Measure(f"{case}: logits", distance(model(ids).logits, plain), 0.0)
            after = {**surroundings(), **_model_state(model)}
            for what, value in {**around, **before}.items():
                yield holds(f"{case}: {what}", after[what] == value, f"{what} changed")
            try:
                with attach(model, made(subject)):
                    model(ids)
                    raise KeyError("on purpose")
            except KeyError:
                continue


def _model_state(model: nn.Module) -> dict[str, Any]:
    from attlas.hf.interface import implementation

    return {
        "implementation": implementation(model.config),
        "hooks": sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
            for m in model.modules()
        ),
        "forwards": [("forward" in vars(m)) for m in model.modules()],
        "classes": [type(m).__name__ for m in model.modules()],
    }


@check("part", poisoned=False)
def generates(subject: Subject) -> Iterator[Measure]:
    """Greedy search, sampling and beams end with finite logits, for one row and for two."""
    from attlas.attach import attach

    model = small_llama()
    ways: dict[str, dict[str, Any]] = {
        "greedy": {}, "sampling": {"do_sample": True}, "beams": {"num_beams": 2},
    }  # fmt: skip
    for way, options in ways.items():
        for batch in (1, 2):
            with attach(model, made(subject)):
                logits = continued(model, prompt(24, batch), **options)
            yield finite(f"{way} batch={batch}", logits)
            yield holds(f"{way} length", len(logits) == 6, f"{len(logits)} tokens instead of 6")


@check("part", poisoned=False, when=lambda subject: leaves_prompt(subject))
def prompt_exact(subject: Subject) -> Iterator[Measure]:
    """The prompt's own logits are those of the model alone."""
    from attlas.attach import attach

    model, ids = small_llama(), prompt(24, 2)
    with torch.no_grad():
        plain = model(ids).logits
        with attach(model, made(subject)):
            yield same("prompt", model(ids).logits, plain)


@check("part", poisoned=False, when=lambda subject: not subject.object.whole_prompts)
def pieces(subject: Subject) -> Iterator[Measure]:
    """A prompt in several calls continues as one in a single call, and is recorded as one."""
    from torch.utils._pytree import tree_leaves

    from attlas.attach import attach

    model, ids, found, recorded = small_llama(), prompt(24, 2), [], []
    ways: list[dict[str, Any]] = [{}, {"prefill_chunk_size": 7}]
    for options in ways:
        with attach(model, part := made(subject)):
            found.append(continued(model, ids, **options))
            leaves = tree_leaves(part.result()) if is_recorder(subject) else []
            recorded.append([leaf.float() for leaf in leaves if isinstance(leaf, Tensor)])
    yield same("chunks of 7", found[1], found[0])
    for one, several in zip(*recorded, strict=True):
        yield same("what is recorded", several, one)


@check("part", poisoned=False, when=changes_nothing)
def whole_budget(subject: Subject) -> Iterator[Measure]:
    """A budget of everything changes nothing."""
    from attlas.attach import attach

    model, ids = small_llama(), prompt(24, 2)
    plain = continued(model, ids)
    everything = subject.object.everything
    with attach(model, made(subject, **everything)):
        yield same(f"{everything}", continued(model, ids), plain)
    if is_policy(subject):
        with attach(model, made(subject, tokens=500)):
            yield same("tokens=500 of 24", continued(model, ids), plain)


@check("part", poisoned=False, when=is_cache_part)
def stored(subject: Subject) -> Iterator[Measure]:
    """A prompt's cache goes on from a file as it does in memory."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    from attlas.attach import attach
    from attlas.hf.caches import with_cache
    from attlas.storage import load_cache, save_cache

    model, ids = small_llama(), prompt(24, 2)
    more = ids[:, :1]
    with TemporaryDirectory() as folder, torch.no_grad(), attach(model, made(subject)) as session:
        model(ids, use_cache=True)
        path = Path(folder) / "cache.safetensors"
        save_cache(session.cache, path, model)
        held = session.kv_bytes
        here = model(more, **with_cache(model, session.cache)).logits
        cache = load_cache(path, model)
        there = model(more, **with_cache(model, cache)).logits
        yield Measure("logits", distance(there, here), 0.0)
        yield holds("bytes", path.stat().st_size >= held, f"{path.stat().st_size} for {held}")


@check("part", poisoned=False, when=is_policy)
def bytes_promised(subject: Subject) -> Iterator[Measure]:
    """The cache holds the promised bytes: never more, and within 2 % of them."""
    from attlas.attach import attach

    model, ids = small_llama(torch.float32), prompt(256)
    with torch.no_grad(), attach(model) as session:
        model(ids, use_cache=True)
        full = session.kv_bytes
    promise = full * 3 // 5
    budgets: dict[str, dict[str, Any]] = {"bytes": {"bytes": promise}, "keep=0.6": {"keep": 0.6}}
    for case, options in budgets.items():
        with torch.no_grad(), attach(model, made(subject, **options)) as session:
            model(ids, use_cache=True)
            held = session.kv_bytes
            if "keep" in options:  # a share is one of tokens; slot indices come on top
                bodies = [b for layer in session.cache.layers for b in layer.bodies.values()]
                slots = [layer.index for layer in session.cache.layers]
                slots += [getattr(body, "column", None) for body in bodies]
                held -= sum(t.nbytes for t in slots if t is not None)
        yield holds(f"{case} at most", held <= promise, f"{held} bytes held, {promise} promised")
        off = abs(held - promise) / promise
        yield Measure(f"{case} within", off, 0.02, f"{held} bytes held, {promise} promised")


@check("part", poisoned=False, when=reads_prompts)
def padding(subject: Subject) -> Iterator[Measure]:
    """A prompt in a batch padded on the left continues as it does alone."""
    from attlas.attach import attach

    model, ids = small_llama(), prompt(30, 2)
    ids[0, :8] = 0
    valid = (ids != 0).long()
    with attach(model, made(subject)):
        alone = continued(model, ids[:1, 8:])
    with attach(model, made(subject)):
        together = continued(model, ids, valid)
    yield same("left", together[:, :1], alone)


@check("part", poisoned=False, when=is_recorder)
def recorded(subject: Subject) -> Iterator[Measure]:
    """A recorder changes no logit, and what it gives is finite, with the layers first."""
    from torch.utils._pytree import tree_leaves

    from attlas.attach import attach

    model, ids = small_llama(), prompt(24, 2)
    plain = continued(model, ids)
    recorder = made(subject)
    with attach(model, recorder):
        yield same("generate", continued(model, ids), plain)
    recorder = made(subject)
    with attach(model, recorder), torch.no_grad():
        model(ids)
    found = [leaf for leaf in tree_leaves(recorder.result()) if isinstance(leaf, Tensor)]
    yield holds("something", bool(found), "result() holds no tensor")
    yield finite("finite", *(leaf.float() for leaf in found))
    shapes = [list(leaf.shape) for leaf in found]
    yield holds("layers first", all(s[0] == 6 for s in shapes), f"of shapes {shapes} for 6 layers")


@check("part", poisoned=False, when=is_policy)
def wrong_budgets(subject: Subject) -> Iterator[Measure]:
    """Budgets out of range, none, or two at once are a ValueError that names them."""
    for keep in (0.0, -0.5, 1.5):
        yield refuses(f"keep={keep}", partial(made, subject, keep=keep), "keep")
    yield refuses("tokens=0", lambda: made(subject, tokens=0), "tokens")
    yield refuses("two budgets", lambda: made(subject, keep=0.5, tokens=8), "keep")


@check("part", poisoned=False)
def twice_refused(subject: Subject) -> Iterator[Measure]:
    """A second session on the same model is refused, and the first goes on."""
    from attlas.attach import attach

    model, ids = small_llama(), prompt(24)

    def again() -> None:
        with attach(model, made(subject)):
            pass

    with attach(model, made(subject)):
        yield refuses("attached already", again, "attach")
        yield finite("goes on", continued(model, ids))


@check("part")
def described(subject: Subject) -> Iterator[Measure]:
    """The docstring of the module or the class says what is done."""
    docs = inspect.getdoc(subject.object) or inspect.getdoc(inspect.getmodule(subject.object))
    yield holds("docstring", bool(docs), "no docstring")
