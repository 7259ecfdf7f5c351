"""The checks of steerers and patches: doing nothing changes nothing, and they go with other parts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attlas.contract.families import distinct, find
from attlas.contract.measure import Measure, Subject, check, finite, holds, same
from attlas.contract.parts import continued, made, prompt, small_llama
from attlas.errors import UserError


def does_nothing(subject: Subject) -> bool:
    """Whether the part names options with which it changes nothing."""
    return subject.object.nothing is not None


def _identity(subject: Subject) -> Iterator[Measure]:
    from attlas.attach import attach

    nothing = subject.object.nothing
    for name in distinct("rotary", "windows", "soft-caps", "sinks"):
        model = find(name).model()
        ids = prompt(24, 2)
        plain = continued(model, ids)
        try:
            with attach(model, made(subject, **nothing)):
                yield same(f"{name} {nothing}", continued(model, ids), plain)
        except UserError as error:  # what a model cannot give is refused by name
            told = type(model).__name__ in str(error) or subject.object.__name__ in str(error)
            yield holds(name, told, f"the refusal names neither the part nor the model: {error}")


@check("steer", poisoned=False, when=does_nothing)
def nothing_changes_nothing(subject: Subject) -> Iterator[Measure]:
    """With the options that it names, every family of models says what it says alone."""
    yield from _identity(subject)


@check("patch", poisoned=False, when=does_nothing)
def patches_nothing(subject: Subject) -> Iterator[Measure]:
    """With the options that it names, every family of models says what it says alone."""
    yield from _identity(subject)


def _changes(subject: Subject) -> Iterator[Measure]:
    from attlas.attach import attach

    model, ids = small_llama(), prompt(24, 2)
    with torch.no_grad():
        plain = model(ids).logits
        with attach(model, made(subject)):
            steered = model(ids).logits
        yield finite("logits", steered)
        yield holds("changed", not torch.equal(steered, plain), "the example changes nothing")
        with attach(model, made(subject, layers=[-1], heads=[0])):
            one = model(ids).logits
    apart = not torch.equal(one, plain) and not torch.equal(one, steered)
    yield holds("one head of one layer", apart, "layers=[-1], heads=[0] are not heeded")


@check("steer", poisoned=False)
def changes_what_it_says(subject: Subject) -> Iterator[Measure]:
    """The example changes logits, and one head of one layer changes them otherwise."""
    yield from _changes(subject)


@check("patch", poisoned=False)
def patches_what_it_says(subject: Subject) -> Iterator[Measure]:
    """The example changes logits, and one head of one layer changes them otherwise."""
    yield from _changes(subject)


@check("steer", poisoned=False)
def decodes_as_it_reads(subject: Subject) -> Iterator[Measure]:
    """Prefill and single steps give what one full pass gives, also behind padding on the left."""
    from attlas.attach import attach
    from attlas.hf.caches import cache_of, with_cache

    model, ids = small_llama(), prompt(24)
    padded = torch.cat([torch.zeros_like(ids[:, :5]), ids], dim=1)
    valid = (padded != 0).long()
    positions = (valid.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad(), attach(model, made(subject)):
        whole = model(ids).logits[:, 16:]
    with torch.no_grad(), attach(model, made(subject)):
        cache = cache_of(model(ids[:, :16], use_cache=True))
        steps: list[Tensor] = []
        for at in range(16, 24):
            out = model(ids[:, at : at + 1], **with_cache(model, cache))
            steps.append(out.logits)
        yield same("steps", torch.cat(steps, dim=1), whole)
    with torch.no_grad(), attach(model, made(subject)):
        out = model(padded, attention_mask=valid, position_ids=positions)
        yield same("padding", out.logits[:, 21:], whole)


@check("steer", poisoned=False)
def beside_other_parts(subject: Subject) -> Iterator[Measure]:
    """Beside a cache policy with a budget of everything and a recorder it does what it does alone."""
    from attlas.attach import attach
    from attlas.catalog import registry

    model, ids = small_llama(), prompt(24, 2)
    with attach(model, made(subject)):
        alone = continued(model, ids)
    whole = registry.make("snapkv", keep=1.0, window=4)
    with attach(model, whole, made(subject), record=["entropy"]) as session:
        yield same("with snapkv and entropy", continued(model, ids), alone)
        yield finite("entropy", session["entropy"])
