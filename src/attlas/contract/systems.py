"""The checks of systems, on the small example that needs no pretrained model."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator

from attlas.contract.measure import Measure, Subject, check, holds, refuses
from attlas.errors import UserError
from attlas.kinds.system import System, scores

SEED = 0


def _made(subject: Subject) -> System:
    """A small system, built and fitted."""
    system: System = subject.made()
    if system.needs is not None:
        raise ValueError(f"the example needs {system.needs!r}; give one that needs no model")
    system.build()
    system.fit(SEED)
    return system


@check("system", poisoned=False)
def data_repeat(subject: Subject) -> Iterator[Measure]:
    """The same seed makes the same examples, another seed or split others."""
    system: System = subject.made()
    for cell in system.cells:
        first, again = (system.data(cell, SEED) for _ in range(2))
        yield holds(cell, bool(first) and first == again, "the same seed made other examples, or none")
        yield holds(f"{cell}, seed", first != system.data(cell, SEED + 1), "another seed, same data")
        train = system.data(cell, SEED, "train")
        yield holds(f"{cell}, split", first != train, "it is tested on what it is trained on")


@check("system", poisoned=False)
def scores_sound(subject: Subject) -> Iterator[Measure]:
    """The target itself scores 1, and every answer between 0 and 1."""
    system: System = subject.made()
    for cell in system.cells:
        examples = system.data(cell, SEED)
        right = scores(system, [e.target for e in examples], examples)
        yield holds(f"{cell}, targets", set(right) == {1.0}, f"targets score {min(right)}")
        guessed = scores(system, system.guess([e.input for e in examples], SEED), examples)
        inside = all(0.0 <= s <= 1.0 for s in guessed)
        yield holds(f"{cell}, guesses", inside, f"guesses score {min(guessed)} to {max(guessed)}")


@check("system", poisoned=False)
def beats_the_baseline(subject: Subject) -> Iterator[Measure]:
    """In every cell the fitted system's mean score is above the trivial baseline's."""
    system = _made(subject)
    for cell in system.cells:
        examples = system.data(cell, SEED)
        inputs = [e.input for e in examples]
        own = sum(scores(system, system.predict(inputs), examples))
        trivial = sum(scores(system, system.guess(inputs, SEED), examples))
        count = len(examples)
        yield holds(cell, own > trivial, f"{own / count:.3f} against {trivial / count:.3f}")


@check("system", poisoned=False)
def repeats_with_its_seed(subject: Subject) -> Iterator[Measure]:
    """Fitted twice with one seed it says the same, and so does the baseline."""
    first, again = _made(subject), _made(subject)
    for cell in first.cells:
        inputs = [e.input for e in first.data(cell, SEED)]
        same = first.predict(inputs) == again.predict(inputs)
        yield holds(cell, same, "the same seed gave other answers")
        same = first.guess(inputs, SEED) == again.guess(inputs, SEED)
        yield holds(f"{cell}, baseline", same, "the same seed gave other guesses")


@check("system", poisoned=False)
def saved_and_loaded(subject: Subject) -> Iterator[Measure]:
    """Saved and loaded it says the same; a folder of another system, or of none, is refused."""
    system, fresh = _made(subject), subject.made()
    fresh.build()
    with tempfile.TemporaryDirectory() as folder:
        yield refuses("an empty folder", lambda: fresh.load(folder), folder)
        system.save(folder)
        fresh.load(folder)
        for cell in system.cells:
            inputs = [e.input for e in system.data(cell, SEED)]
            same = fresh.predict(inputs) == system.predict(inputs)
            yield holds(cell, same, "other answers after loading")
        other = type("Other", (type(system),), {})(**{**subject.kind.small, **subject.example})
        yield refuses("another system's folder", lambda: other.load(folder), folder)


@check("system", poisoned=False)
def wrong_inputs(subject: Subject) -> Iterator[Measure]:
    """Inputs that are none, a cell and an option that there are not, are refused by name."""
    system = _made(subject)
    yield refuses("inputs", lambda: system.predict([object()]), "inputs")
    yield refuses("cell", lambda: system.data("no-such-cell", SEED), "no-such-cell", "cell")
    taken = subject.object.__name__
    try:
        subject.made(no_such_option=1)
    except (TypeError, UserError) as error:
        yield holds("option", "no_such_option" in str(error), f"{taken}: {error}")
    else:
        yield holds("option", False, "an option that it has not was accepted")


@check("system", poisoned=False)
def described(subject: Subject) -> Iterator[Measure]:
    """Its docstring says what is done and, where a paper is implemented, where it comes from."""
    docs = inspect.getdoc(inspect.getmodule(subject.object)) or inspect.getdoc(subject.object) or ""
    yield holds("docstring", len(docs) > 40, "no docstring")
