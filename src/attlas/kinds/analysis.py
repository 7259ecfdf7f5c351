"""Analysis: what looks at a whole model, by its weights or by several runs of it, and tells of its heads.

    @mechanism("my-analysis", paper="")
    class MyAnalysis(Analysis):
        needs = "text"                                    # or "weights", "prompts", "pictures"

        def run(self, subject, tick):
            with attach(subject.model, record=["weights"]) as session:
                subject.forward()
            first = session["weights"][..., 0].mean(dim=(1, 3))       # [layers, heads]
            return Findings(heads={"first": Scores(first, "mean weight on the first token")})

    findings = attlas.make("my-analysis").look(Subject(model, input_ids=ids))

One that watches a single forward pass is a `Recorder`; an analysis makes runs of its own (with other
prompts, with heads taken out, backwards) or none at all. `attlas inspect MODEL --with my-analysis` runs
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas.catalog.kinds import ANALYSIS, Kind
from attlas.errors import UserError
from attlas.options import Configured

if TYPE_CHECKING:
    from attlas.inspect.subject import Subject

Needs = Literal["weights", "text", "prompts", "pictures"]


@dataclass(frozen=True)
class Scores:
    """One number for each head.

    Attributes:
        values: [layers, heads], NaN for a head that has none.
        meaning: what a large one says, in one line.
    """

    values: Float[Tensor, "layers heads"]
    meaning: str

    def top(self, count: int) -> list[tuple[int, int]]:
        """(layer, head) of the largest, the largest first; heads without a number are left out."""
        flat = self.values.flatten().nan_to_num(nan=-torch.inf)
        best = flat.topk(min(count, int((~self.values.isnan()).sum()))).indices.tolist()
        return [divmod(at, self.values.shape[1]) for at in best]


@dataclass(frozen=True)
class Table:
    """What is told in rows: words and numbers under the names of columns."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]


@dataclass(frozen=True)
class Findings:
    """What an analysis found.

    The page of `attlas inspect` draws arrays of these names: "flow" [layers, tokens, tokens], the share
    that each token takes of each earlier one; "circuit" [edges, 5], (layer, head) of a sender, (layer,
    head) of a receiver and a weight, with the head −1 for an MLP, the layer −1 for the embedding and the
    number of layers for the logits; "joint" [layers, heads, 2, tokens, 2], queries and keys of each head
    in the plane.

    Attributes:
        heads: scores of heads, by name.
        arrays: tensors that are told besides, by name.
        tables: what is told in rows.
        says: sentences.
    """

    heads: Mapping[str, Scores] = field(default_factory=dict)
    arrays: Mapping[str, Tensor] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    says: Sequence[str] = ()


class Analysis(Configured):
    """Looks at a model and tells what it found."""

    kind: ClassVar[Kind] = ANALYSIS
    #: What it is given beside the model: nothing ("weights"), token ids ("text"), pairs of prompts with
    #: answers ("prompts"), or pictures with labels ("pictures").
    needs: ClassVar[Needs] = "text"
    #: The preset of `attlas inspect` that it belongs to; none without.
    inspects: ClassVar[str] = ""
    #: It takes gradients; else nothing that it does is differentiated.
    wants_gradients: ClassVar[bool] = False

    def check(self, subject: Subject) -> None:
        """Look at the model and what is given with it before anything runs.

        Raises:
            ValueError: this analysis cannot work on them.
        """

    def run(self, subject: Subject, tick: Callable[[float], None]) -> Findings:
        """The analysis itself, the model in evaluation mode; `tick` is told the share done."""
        raise NotImplementedError

    def look(
        self, subject: Subject, tick: Callable[[float], None] = lambda share: None
    ) -> Findings:
        """What it finds; the model is afterwards as it was.

        Random numbers are drawn from the subject's seed, and the program's own go on as if nothing had
        run.

        Raises:
            ValueError: something that it needs is not given, or it cannot work on this model.
        """
        subject.require(self.needs, type(self).__name__)
        self.check(subject)
        devices = [subject.device] if subject.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices),
            evaluating(subject.model, self.wants_gradients),
        ):
            torch.manual_seed(subject.seed)
            found = self.run(subject, tick)
        for name, scores in found.heads.items():
            shape = (subject.layers, subject.heads)
            if tuple(scores.values.shape) != shape:
                raise UserError(
                    f"{type(self).__name__} gave {name!r} as {list(scores.values.shape)}, the model has "
                    f"{shape[0]} layers of {shape[1]} heads"
                )
        return found

    @classmethod
    def sample(cls) -> Subject | None:
        """A small subject that the contract tries it on; None for one that the contract makes."""
        return None


@contextmanager
def evaluating(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """A model in evaluation mode whose weights ask for no gradient, for as long as the block lasts.

    Args:
        model: whose modes and flags are put back behind the block.
        gradients: whether gradients of anything else are taken in it.
    """
    training = {module: module.training for module in model.modules()}
    asked = [weight for weight in model.parameters() if weight.requires_grad]
    model.eval()
    for weight in asked:
        weight.requires_grad_(False)
    try:
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for weight in asked:
            weight.requires_grad_(True)
        for module, mode in training.items():
            module.training = mode
