"""Claim: what a paper says of its mechanism, as a study that trains small models with it and without.

It is declared in the mechanism's own file, on its class:

    claims = (Claim("negative weights make heads more expressive", task="shakespeare-bytes"),)

`attlas study NAME`, NAME being the mechanism's, trains it beside what it is held against, and
`attlas study claims` all that there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from attlas.errors import UserError
from attlas.kinds.study import Beats, Expectation, NoWorse, Row, Study
from attlas.options import option

if TYPE_CHECKING:
    from attlas.train.plan import Plan


class Claim(Study):
    """A paper's claim that training shows."""

    says: str = option("the claim, in our words", kw_only=False)
    task: str = option("as `attlas train` takes it", kw_only=False)
    ours: str = option(
        "the mechanism as `attlas train` takes it; that of the class that declares it unless given",
        default="",
    )  # fmt: skip
    against: tuple[str, ...] = option(
        "what it is held against; the first decides between partly and does not hold here",
        default=("softmax",),
    )  # fmt: skip
    split: str = option("the test that counts; the task's first unless given", default="")
    better: Literal["higher", "lower"] = option("which score is better", default="higher")
    margin: float | None = option(
        "how much worse than the first rival is still no worse, as a share; None: better",
        default=None,
    )
    also: str = option("tells several claims of one mechanism apart", default="")
    steps: int = option("of the optimiser", default=1000, at_least=1)
    batch: int = option("rows of a step", default=32, at_least=1)
    rate: float = option("highest learning rate", default=3e-3, above=0)
    exact: bool = option("train in float32 on a GPU too, where it is bfloat16 else", default=False)
    dim: int = option("width of the model", default=64, at_least=1)
    layers: int = option("of the model", default=2, at_least=1)
    heads: int = option("of each layer", default=4, at_least=1)

    def setup(self) -> None:
        """Refuse to be held against nothing, and a GPU by its number."""
        super().setup()
        if not self.against:
            raise ValueError("against takes one or more mechanisms, got ()")
        if ":" in self.device:
            raise ValueError(
                f"device of a training is 'cpu' or 'cuda', got {self.device!r}; CUDA_VISIBLE_DEVICES "
                "chooses among GPUs"
            )

    @property
    def name(self) -> str:
        """The mechanism's, with what tells several claims apart."""
        mechanism = self.ours.partition("(")[0]
        return f"{mechanism}-{self.also}" if self.also else mechanism

    @property
    def claim(self) -> str:
        """What it says."""
        return self.says

    @property
    def set_up(self) -> str:
        """The task, the split that counts and the margin."""
        split = f", {self.split}" if self.split else ""
        margin = f"; no worse than by {self.margin:.0%}" if self.margin is not None else ""
        return f"`{self.task}`{split}{margin}"

    @property
    def expects(self) -> tuple[Expectation, ...]:
        """Better than all, or no worse than the first."""
        *against, ours = self.labels
        if self.margin is not None:
            return (NoWorse(ours, against[0], self.margin),)
        return tuple(Beats(ours, other) for other in against)

    @property
    def labels(self) -> tuple[str, ...]:
        """What is trained, ours last, named as `attlas train` names it."""
        return tuple(mechanism.label for mechanism in self._plan().mechanisms)

    def run(self, seed: int) -> Iterator[Row]:
        """Train each with this seed, on the same data, and score it on the split."""
        from pathlib import Path
        from tempfile import TemporaryDirectory

        from attlas.train.build import check_fit
        from attlas.train.loop import Trainer, TrainingBench
        from attlas.train.plan import Run
        from attlas.train.run import accelerated

        plan = self._plan()
        task = plan.made_task()
        split = self.split or task.splits[0]
        if split not in task.splits:
            raise UserError(f"split of {self.task} is one of {list(task.splits)}, got {split!r}")
        check_fit(plan, task)
        with TemporaryDirectory() as folder:
            accelerator = accelerated(plan.device, plan.dtype)
            bench = TrainingBench(plan, task, accelerator, Path(folder), lambda steps, loss: None)
            for label in self.labels:
                trainer = Trainer(bench, Run(label, seed))
                trainer.train()
                yield Row(label, trainer.score(split), "", self.better)

    def _plan(self) -> Plan:
        """As `attlas train` makes it of the same options."""
        from attlas.train.plan import Plan, parse_mechanisms, parse_task

        kind = self.device.partition(":")[0]
        return Plan(
            task=parse_task(self.task)[0], mechanisms=parse_mechanisms([*self.against, self.ours]),
            seeds=self.seeds, steps=self.steps, batch=self.batch, accumulate=1, rate=self.rate,
            dim=self.dim, layers=self.layers, heads=self.heads, tested=512, save=self.steps,
            device=kind, dtype="float32" if kind == "cpu" or self.exact else "bfloat16",
        )  # fmt: skip
