"""The checks of adapters: in small random models they start as told, leave no trace, merge and save.

Most look at an adapter that was disturbed: what it trains is set to random numbers of the size of a
training's, since one that starts as nothing would pass everything.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from attlas.contract.measure import Measure, Subject, check, distance, finite, holds, refuses, same
from attlas.contract.networks.state import surroundings
from attlas.contract.parts import continued, prompt, small_llama
from attlas.hf.caches import DynamicCache, StaticCache, with_cache
from attlas.kinds.adapter import Adapter
from attlas.kinds.injection import adapters_of

#: Families of models that an adapter works on or refuses by name, with options beside the sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": {"num_key_value_heads": 2}, "GPTNeoX": {"rotary_pct": 0.5}, "Gemma3Text": {
        "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}  # fmt: skip


def small(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """A causal model of a family with random weights: 4 layers, 4 heads of width 8."""
    from attlas.hf.models import AutoModelForCausalLM, config_class

    torch.manual_seed(0)
    config = config_class(f"{family}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=512, initializer_range=0.3, pad_token_id=0,
        bos_token_id=1, eos_token_id=None, **FAMILIES[family],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_()  # they start at 0, where none would be missed
    return model


def made(subject: Subject, **options: object) -> Adapter:
    """The adapter of the example, and these options over it."""
    found: Adapter = subject.object(**{**subject.example, **options})
    return found


def disturbed(subject: Subject, model: Any) -> Adapter:
    """The adapter, injected, and what it trains moved by random numbers."""
    adapter = made(subject)
    adapter.inject(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.trainable().values():
            parameter.add_(0.1 * torch.randn(parameter.shape).to(parameter))
    return adapter


def logits(model: Any, ids: Tensor, **options: object) -> Tensor:
    """Of all tokens, without gradients."""
    with torch.no_grad():
        found: Tensor = model(ids, **options).logits
    return found


@check("adapter", poisoned=False)
def identity_at_the_start(subject: Subject) -> Iterator[Measure]:
    """Freshly injected, with the options that it says change nothing, it changes no logit."""
    model, ids = small_llama(), prompt(24, 2)
    plain, written = logits(model, ids), continued(model, ids)
    nothing = subject.object.nothing
    with made(subject, **nothing).inject(model):
        yield same(f"{dict(nothing)}", logits(model, ids), plain)
        yield same(f"{dict(nothing)} generate", continued(model, ids), written)


@check("adapter", poisoned=False)
def undone(subject: Subject) -> Iterator[Measure]:
    """Used, trained a step and undone, by call or by an exception, the model is what it was."""
    model, ids = small_llama(), prompt(24, 2)
    model.lm_head.weight.requires_grad_(False)  # a flag that undoing must bring back
    plain, around, before = logits(model, ids), surroundings(), _state(model)
    for case in ("called", "left by an exception"):
        torch.manual_seed(0)
        undo = made(subject).inject(model)
        _step(undo.adapter, model, ids)
        continued(model, ids)
        if case == "called":
            undo()
        else:
            try:
                with undo:
                    raise KeyError("on purpose")
            except KeyError:
                pass
        yield Measure(f"{case}: logits", distance(logits(model, ids), plain), 0.0)
        after = _state(model)
        for what, value in before.items():
            yield holds(f"{case}: {what}", after[what] == value, f"{what} changed")
    after = surroundings()
    for what, value in around.items():
        if what != "generator":  # generating may draw
            yield holds(what, after[what] == value, f"{what} changed")


def _state(model: nn.Module) -> dict[str, Any]:
    """All that an adapter could leave changed in a model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {
        "modules": {name: (id(m), type(m), m.training) for name, m in model.named_modules()},
        "parameters": {n: (id(p), p.requires_grad, p.grad) for n, p in model.named_parameters()},
        "weights": {n: t.numpy().tobytes() for n, t in model.state_dict().items()},
        "hooks": [len(getattr(m, name)) for m in model.modules() for name in hooks],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "config": json.dumps(model.config.to_dict(), default=str),  # type: ignore[union-attr, operator]
    }


def _step(adapter: Any, model: Any, ids: Tensor) -> None:
    """One step of gradient descent on what the adapter trains."""
    trained = list(adapter.trainable().values())
    if trained:
        adapter.loss(model, ids, 0.0).backward()
        torch.optim.SGD(trained, lr=0.1).step()


@check("adapter", poisoned=False)
def base_untouched(subject: Subject) -> Iterator[Measure]:
    """A step of training changes what it trains and gives gradients to that alone."""
    model, ids = small_llama(), prompt(24, 2)
    own = {id(p): p.detach().clone() for p in model.parameters()}
    adapter = made(subject)
    with adapter.inject(model):
        trained = adapter.trainable()
        ids_of = {id(p) for p in trained.values()}
        found = {name: id(p) for name, p in model.named_parameters()}
        yield holds(
            "in the model", ids_of <= set(found.values()), "trains what is not in the model"
        )
        before = {name: p.detach().clone() for name, p in trained.items()}
        loss = adapter.loss(model, ids, 0.0)
        yield finite("loss", loss)
        _step(adapter, model, ids)
        yield finite("gradients", *(p.grad for p in trained.values()))
        # Where one factor starts at 0 the other has no gradient yet, so one of them is enough.
        moved = any(not torch.equal(p, before[n]) for n, p in trained.items())
        yield holds("trained", moved or not trained, "a step changed nothing that it trains")
        for name, parameter in model.named_parameters():
            if id(parameter) in ids_of:
                continue
            yield holds(f"{name} frozen", not parameter.requires_grad, "it asks for gradients")
            yield holds(f"{name} gradient", parameter.grad is None, "it has a gradient")
            if id(parameter) in own:
                kept = torch.equal(parameter, own[id(parameter)])
                yield holds(f"{name} value", kept, "it was changed")
        injected = model.get_input_embeddings().weight
        yield holds("embeddings", id(injected) in own, "the embeddings are not the model's own")


@check("adapter", poisoned=False)
def merged(subject: Subject) -> Iterator[Measure]:
    """Merged it computes the same, by the two-times rule, as a plain model that Transformers saves
    and loads; what cannot be merged refuses by its name."""
    ids, found = prompt(24, 2), {}
    for dtype in (torch.float64, torch.float32):
        found[dtype] = small_llama(dtype)
        adapter = disturbed(subject, found[dtype])
        if dtype == torch.float64:
            exact = logits(found[dtype], ids)
    plain = distance(logits(found[torch.float32], ids), exact)
    classes = [type(m) for m in small_llama().modules()]
    try:
        model = adapter.merge()
    except ValueError as error:
        told = adapter.name in str(error) and "merge" in str(error)
        yield holds("refused", told, f"the message does not name the adapter: {error}")
        return
    again = distance(logits(model, ids), exact)
    floor = torch.finfo(torch.float32).eps * exact.abs().max().item()
    yield Measure("merged", again, 2 * plain + floor)
    yield holds("plain", [type(m) for m in model.modules()] == classes, "modules are left behind")
    yield holds("left", adapter.injection is None, "it is still in the model")
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder).eval()
    yield Measure("loaded", distance(logits(loaded, ids), logits(model, ids)), 0.0)


@check("adapter", poisoned=False)
def saved(subject: Subject) -> Iterator[Measure]:
    """The saved difference makes a fresh model compute the same, and holds no more than it must; one
    of another model, a cut file and one that is none are refused."""
    model, ids = small_llama(torch.float32), prompt(24, 2)
    adapter = disturbed(subject, model)
    wanted = logits(model, ids)
    with TemporaryDirectory() as folder:
        path = adapter.save(Path(folder) / "difference.safetensors")
        size = path.stat().st_size
        kept = sum(t.nbytes for t in adapter.difference().values())
        header = int.from_bytes(path.read_bytes()[:8], "little")
        yield holds("bytes", size <= kept + header + 8, f"{size} bytes for a difference of {kept}")
        weights = sum(t.nbytes for t in model.state_dict().values())
        trained = sum(p.nbytes for p in adapter.trainable().values())
        yield holds("difference", kept <= max(trained, weights // 4), f"{kept} bytes of {weights}")
        fresh = small_llama(torch.float32)
        twin = Adapter.load(path, fresh)
        yield Measure("logits", distance(logits(fresh, ids), wanted), 0.0)
        yield holds("options", twin.options == adapter.options, f"{twin.options} came back")
        other = small_llama(torch.float32)
        with torch.no_grad():
            other.get_input_embeddings().weight.neg_()
        yield refuses("another model", partial(Adapter.load, path, other), "another model")
        path.write_bytes(path.read_bytes()[: size // 2])
        yield refuses("cut short", partial(Adapter.load, path, small_llama()), "damaged")
        yield refuses("no file", partial(Adapter.load, Path(folder) / "none", model), "no saved")


@check("adapter", poisoned=False)
def decoding(subject: Subject) -> Iterator[Measure]:
    """Chunks and single tokens with any cache equal one full pass; beams and sampling end."""
    model, ids = small_llama(), prompt(24, 2)
    disturbed(subject, model)
    whole = logits(model, ids)
    caches = {
        "with a config": DynamicCache(config=model.config), "without": DynamicCache(),
        "static": StaticCache(config=model.config, max_cache_len=32),
    }  # fmt: skip
    for case, cache in caches.items():
        pieces = [
            logits(model, p, **with_cache(model, cache)) for p in ids.split([9, 1, 1, 13], dim=1)
        ]
        yield same(f"cache {case}", torch.cat(pieces, 1), whole)
    written = continued(model, ids)
    yield same("no cache", continued(model, ids, use_cache=False), written)
    ways: dict[str, dict[str, Any]] = {"beams": {"num_beams": 2}, "sampling": {"do_sample": True}}
    for way, options in ways.items():
        yield finite(way, continued(model, ids, **options))


@check("adapter", poisoned=False)
def padding(subject: Subject) -> Iterator[Measure]:
    """A prompt in a batch padded on the left continues as it does alone."""
    model, ids = small_llama(), prompt(30, 2)
    ids[0, :8] = 0
    disturbed(subject, model)
    alone = continued(model, ids[:1, 8:])
    yield same("left", continued(model, ids, (ids != 0).long())[:, :1], alone)


@check("adapter", poisoned=False)
def families(subject: Subject) -> Iterator[Measure]:
    """Other families work, are undone and decode, or are refused by name and left as they were."""
    ids = prompt(16, 2)
    for family in FAMILIES:
        model = small(family)
        plain, before = logits(model, ids), _state(model)
        try:
            adapter = disturbed(subject, model)
        except ValueError as error:
            yield holds(f"{family} named", _names(error, model), f"not by name: {error}")
            after = _state(model)
            yield holds(f"{family} unchanged", after == before, "refused, and yet changed")
            continue
        whole, cache = logits(model, ids), DynamicCache(config=model.config)
        pieces = [
            logits(model, p, **with_cache(model, cache)) for p in ids.split([11, 1, 4], dim=1)
        ]
        yield same(f"{family} decoded", torch.cat(pieces, 1), whole)
        assert adapter.injection is not None
        adapter.injection.undo()
        yield Measure(f"{family} undone", distance(logits(model, ids), plain), 0.0)


def _names(error: Exception, model: Any) -> bool:
    """Whether a refusal tells of the model's family or of one of its modules."""
    parts = {piece for name, _ in model.named_modules() for piece in name.split(".")} - {""}
    known = {model.config.model_type, type(model).__name__, *parts}
    return any(name in str(error) for name in known if not name.isdigit())


@check("adapter", poisoned=False)
def copied(subject: Subject) -> Iterator[Measure]:
    """A deep copy of the model computes the same, shares nothing and is undone by itself."""
    model, ids = small_llama(), prompt(24, 2)
    plain = logits(model, ids)
    adapter = disturbed(subject, model)
    wanted = logits(model, ids)
    twin, third = deepcopy(model), deepcopy(model)
    yield Measure("copy", distance(logits(twin, ids), wanted), 0.0)
    (of_twin,) = adapters_of(twin)
    assert of_twin.injection is not None
    of_twin.injection.undo()
    yield Measure("copy undone", distance(logits(twin, ids), plain), 0.0)
    yield Measure("original", distance(logits(model, ids), wanted), 0.0)
    with torch.no_grad():
        for parameter in adapter.trainable().values():
            parameter.zero_()
    yield Measure("apart", distance(logits(third, ids), wanted), 0.0)


@check("adapter", poisoned=False)
def refusals(subject: Subject) -> Iterator[Measure]:
    """A second injection, saving an injected model whole, and use without a model are refused."""
    model, adapter = small_llama(), made(subject)
    yield refuses("merge() alone", adapter.merge, adapter.name)
    yield refuses("save() alone", partial(adapter.save, "difference.safetensors"), adapter.name)
    with adapter.inject(model), TemporaryDirectory() as folder:
        yield refuses("same model", partial(made(subject).inject, model), adapter.name)
        yield refuses("two models", partial(adapter.inject, small_llama()), adapter.name)
        yield refuses("save_pretrained", partial(model.save_pretrained, folder), "merge")
        yield finite("goes on", logits(model, prompt(8)))


@check("adapter")
def described(subject: Subject) -> Iterator[Measure]:
    """It has a docstring, and options that a file can hold."""
    docs = inspect.getdoc(inspect.getmodule(subject.object)) or inspect.getdoc(subject.object)
    yield holds("docstring", bool(docs), "no docstring")
    options = made(subject).options
    yield holds("options", json.loads(json.dumps(options)) == options, f"JSON changes {options}")
    yield holds("kept", all(options[k] == v for k, v in subject.example.items()), f"of {options}")
