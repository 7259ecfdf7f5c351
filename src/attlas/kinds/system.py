"""System: a whole job, from data to answers to a score, held against a trivial baseline.

    @mechanism("my-system", example={"size": 8})
    class MySystem(System):
        size: int = option("numbers of a task", default=64, at_least=1)

        cells = ("short", "long")                        # what is scored apart

        def data(self, cell, seed, split="test"): ...    # examples, decided by the seed
        def fit(self, seed, tick=...): ...               # learns from data of the split "train"
        def predict(self, inputs): ...                   # answers
        def guess(self, inputs, seed): ...               # the trivial baseline's
        def score(self, said, target): ...               # in [0, 1]

`attlas run my-system` fits it with several seeds and prints each cell's score beside the baseline's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from attlas.catalog import registry
from attlas.catalog.kinds import SYSTEM, Kind
from attlas.errors import UserError
from attlas.options import Configured

CONFIG, WEIGHTS = "system.json", "system.safetensors"


class Example(NamedTuple):
    """What a system is given, and what it should say."""

    input: Any
    target: Any


class System(Configured):
    """A job."""

    kind: ClassVar[Kind] = SYSTEM
    #: Of its score, with the unit; scores lie in [0, 1] and are shown as per cent.
    title: ClassVar[str] = "accuracy %"

    @property
    def needs(self) -> str | None:
        """The pretrained model that it is built on, by a name that `attlas.load` takes; None without."""
        return None

    @property
    def together(self) -> int:
        """Inputs that `predict` is best given at once; between them a run can be stopped."""
        return 16

    def build(self, model: Any = None, tokenizer: Any = None) -> None:
        """Make it ready for `fit` and `predict`; takes what it `needs`."""

    @property
    def cells(self) -> tuple[str, ...]:
        """What is scored apart: conditions, tasks, lengths."""
        return ("test",)

    def data(self, cell: str, seed: int, split: str = "test") -> list[Example]:
        """Examples of a cell, decided by the seed and the split."""
        raise NotImplementedError

    def fit(self, seed: int, tick: Callable[[float], None] = lambda share: None) -> None:
        """Learn what there is to learn; `tick` is told the share done. Nothing unless overridden."""

    def predict(self, inputs: Sequence[Any]) -> list[Any]:
        """An answer to each input.

        Raises:
            ValueError: inputs that are none of this system's.
        """
        raise NotImplementedError

    def guess(self, inputs: Sequence[Any], seed: int) -> list[Any]:
        """The trivial baseline's answers."""
        raise NotImplementedError

    def score(self, said: Any, target: Any) -> float:
        """How right an answer is, in [0, 1]; equality unless overridden."""
        return float(said == target)

    def conclusions(self, means: Mapping[str, float]) -> list[str]:
        """Sentences that follow from the cells' mean scores."""
        return []

    # Saving: options as JSON, what was learned as safetensors.

    def state(self) -> dict[str, Tensor]:
        """What was learned; empty unless overridden."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state` gave."""

    def save(self, folder: str | Path) -> None:
        """Write options and what was learned into a folder, made where it is missing."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().clone() for name, tensor in self.state().items()}
        save_file(state, folder / WEIGHTS)
        packed = {"name": self.registered_name, "options": self.options}
        # Last, so that a folder with it is whole.
        (folder / CONFIG).write_text(json.dumps(packed), encoding="utf-8")

    def load(self, folder: str | Path) -> None:
        """Take what a system of the same name and options has learned.

        Raises:
            UserError: nothing whole stands there, or it was saved by another system.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            packed = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            found = (packed["name"], packed["options"])
            state = load_file(folder / WEIGHTS)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(
                f"{folder} holds no whole system ({error}); fit and save it anew"
            ) from error
        own = (self.registered_name, json.loads(json.dumps(self.options)))
        if found != own:
            raise UserError(
                f"{folder} was saved by {found[0]} with {found[1]}, this is {own[0]} with {own[1]}"
            )
        self.restore(state)

    @property
    def registered_name(self) -> str:
        """The name it is registered under; its class's where it is not."""
        entry = registry.entry_of(type(self))
        return type(self).__name__ if entry is None else entry.name


def scores(system: System, said: Iterable[Any], examples: Iterable[Example]) -> list[float]:
    """The score of each answer."""
    return [system.score(a, e.target) for a, e in zip(said, examples, strict=True)]
