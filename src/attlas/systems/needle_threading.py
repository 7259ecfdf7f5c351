"""Needle threading: follow threads of keys and values through a haystack of pairs.

    haystack      {"481": "027", "903": "481", ...}                 a JSON object of random pairs
    needle        one key is given; its value is asked for
    needles       several keys; their values in order
    conditional   the values of all keys that hold a *
    thread        a value is the next key, and so on; the last value is asked for. Pairs of a thread
                  stand forward, backward or at random in the text
    threads       several threads at once; their last values in order
    branching     a value is a list of keys, of which one goes on and the others soon end; the last
                  value of the longest thread is asked for

Score: the share of the wanted values that are given, in their places (for `conditional` in any order,
one too many counting as one wrong). A haystack has the asked length within 1 %: as many pairs as fit,
and one value stretched. Baseline: values of the haystack at random, right once in as many as there are.
Effective context: the longest length up to which accuracy is at least `threshold`.

Keys and values are UUIDs in the paper (`size=32`); here decimal numbers of `size` digits by default,
since a model of 135M parameters copies short ones. Questions are the paper's; several are asked of one
haystack, which is read once. Readers: a language model, the `solver`, or a small decoder `trained` on
one needle (every key and value one token; `attlas train --task one-needle`).
Source: "Needle Threading: Can LLMs Follow Threads through Near-Million-Scale Haystacks?" (arXiv
2411.05000); the released data have no branching threads, whose form here is ours.
"""

from __future__ import annotations

import copy
import json
import random
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attlas.catalog.registry import mechanism
from attlas.errors import UnknownName, UserError
from attlas.hf.caches import cache_of, with_cache
from attlas.kinds.system import Example, System
from attlas.options import option
from attlas.tasks.chat import template, tokens
from attlas.tasks.threads import (
    MARK,
    SEVERAL,
    TASKS,
    Question,
    effective,
    haystack,
    solve,
    text_of,
    values,
)
from attlas.tasks.train.one_needle import OneNeedle

_OF = "in the JSON object."
_FOLLOW = "That value may equal another key, and so on: follow them to the end."
#: What is asked, and how the answer begins; `{key}` is the first that is given.
ASKED = {
    "needle": (f"Extract the value corresponding to the specified key {_OF}", '"{key}": "'),
    "needles": (f"Extract the values corresponding to the specified keys {_OF}", '["'),
    "conditional": (f"Extract the values of all keys that contain the character {MARK} {_OF}", '["'),
    "thread": (f"Extract the value of the specified key {_OF} {_FOLLOW} Give the last value.", '"'),
    "threads": (f"Extract the values of the specified keys {_OF} {_FOLLOW} Give the last ones.", '["'),
    "branching": (
        f"Extract the value of the specified key {_OF} It may list several keys: follow all of them and "
        "give the last value of the longest thread.", '"',
    ),
}  # fmt: skip


@mechanism(
    "needle-threading", paper="needle-threading",
    example={"reader": "solver", "lengths": (600,), "samples": 8, "asks": 4, "size": 4, "steps": 3},
)  # fmt: skip
class NeedleThreading(System):
    """Haystacks of keys and values, and who reads them."""

    tasks: tuple[str, ...] | list[str] = option(
        "needle, needles, conditional, threads, branching, thread-forward and so on", default=TASKS
    )
    lengths: tuple[int, ...] | list[int] = option(
        "of the haystacks, in the reader's tokens; in characters where it has no tokenizer",
        default=(256, 512, 1024), at_least=1,
    )  # fmt: skip
    samples: int = option("questions of each task and length", default=100, at_least=1)
    asks: int = option("questions of one haystack at most", default=10, at_least=1)
    size: int = option("digits of a key; 32 for UUIDs", default=3, at_least=1, at_most=32)
    steps: int = option("pairs of a thread", default=3, at_least=2)
    reader: str = option("a model that `attlas.load` takes, solver or trained", default="smollm2")
    threshold: float = option(
        "accuracy that a context needs to count as used", default=0.75, above=0, at_most=1
    )
    mechanism: str = option(
        "attention of the decoder that is trained, as `attlas train --mechanisms` takes it",
        default="multi-token-attention",
    )  # fmt: skip
    train_steps: int = option("of the trained decoder's optimiser", default=400, at_least=1)

    def setup(self) -> None:
        """Refuse options that make no haystack."""
        for name in ("tasks", "lengths"):
            if not getattr(self, name):
                raise UserError(
                    f"{name} takes several, as {name}=(..., ), got {getattr(self, name)!r}"
                )
        for task in self.tasks:
            if task not in TASKS:
                raise UnknownName("task", task, TASKS)
        if "branching" in self.tasks and self.steps < 3:
            raise UserError(f"steps must be at least 3 for branching threads, got {self.steps}")
        if self.reader == "trained" and (set(self.tasks) != {"needle"} or self.size > 2):
            raise UserError("reader 'trained' takes tasks=('needle',) and size=2 or 1")
        if self.reader == "trained":
            _plan(self)  # refuses a mechanism that is no layer

    @property
    def needs(self) -> str | None:
        """The language model that reads."""
        return None if self.reader in ("solver", "trained") else self.reader

    @property
    def together(self) -> int:
        """The questions of one haystack, which is then read once."""
        return self.asks

    def build(self, model: Any = None, tokenizer: Any = None) -> None:
        """Take the reader."""
        self.model, self.tokenizer = model, tokenizer

    @property
    def cells(self) -> tuple[str, ...]:
        """Every task at every length."""
        return tuple(f"{task} {length}" for task in self.tasks for length in self.lengths)

    def data(self, cell: str, seed: int, split: str = "test") -> list[Example]:
        """Questions with their answers, `asks` of a haystack."""
        if cell not in self.cells:
            raise UnknownName("cell", cell, self.cells)
        task, _, length = cell.rpartition(" ")
        tokenizer = getattr(self, "tokenizer", None)
        count = len if tokenizer is None else lambda text: len(tokens(tokenizer, text))
        found: list[Example] = []
        while len(found) < self.samples:
            rng = random.Random(f"{seed}/{split}/{cell}/{len(found)}")
            found += haystack(task, int(length), rng, self.asks, self.size, self.steps, count)
        return found[: self.samples]

    def fit(self, seed: int, tick: Callable[[float], None] = lambda share: None) -> None:
        """Train the decoder; the other readers know what they know."""
        if self.reader == "trained":
            self.net = _trained(self, seed, tick)

    def state(self) -> dict[str, Tensor]:
        """The decoder's weights."""
        net = getattr(self, "net", None)
        return {} if net is None else dict(net.state_dict())

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take the decoder's weights."""
        if self.reader == "trained":
            self.net = _net(self, 0)
            self.net.load_state_dict(state)

    def predict(self, inputs: Sequence[Question]) -> list[tuple[str, ...]]:
        """The values that the reader gives to each question."""
        if not all(isinstance(question, Question) for question in inputs):
            raise UserError(
                f"inputs takes questions of `data`, got {[type(i).__name__ for i in inputs]}"
            )
        if self.reader == "solver":
            return [solve(question) for question in inputs]
        if getattr(self, "net" if self.reader == "trained" else "model", None) is None:
            raise UserError(f"the reader {self.reader!r} is not there yet: call build, then fit")
        if self.reader == "trained":
            return [_read_symbols(self.net, question) for question in inputs]
        groups: dict[str, list[Question]] = {}
        for question in inputs:
            groups.setdefault(question.haystack, []).append(question)
        said = {q: a for group in groups.values() for q, a in self._asked(group).items()}
        return [said[question] for question in inputs]

    def guess(self, inputs: Sequence[Question], seed: int) -> list[tuple[str, ...]]:
        """As many values as are wanted, drawn from the haystack."""
        rng = random.Random(seed)
        return [
            tuple(rng.choices(values(json.loads(q.haystack)), k=len(q.keys) or SEVERAL))
            for q in inputs
        ]

    def score(self, said: Any, target: Any) -> float:
        """The share of the wanted values; a tuple in its order, a set in any."""
        if isinstance(target, frozenset):
            return len(target & set(said)) / max(len(target), len(said))
        right = sum(a == b for a, b in zip(said, target, strict=False))
        return float(right / max(len(target), len(said)))

    def conclusions(self, means: Mapping[str, float]) -> list[str]:
        """The effective context of each task."""
        found = []
        for task in self.tasks:
            length = effective(
                {n: means[f"{task} {n}"] for n in self.lengths if f"{task} {n}" in means},
                self.threshold,
            )
            found.append(f"{task}: at least {self.threshold:.0%} right up to {length} tokens")
        return found

    @torch.inference_mode()
    def _asked(self, questions: list[Question]) -> dict[Question, tuple[str, ...]]:
        """Read the haystack once, then the questions behind copies of its cache."""
        frame = template(self.tokenizer)
        context = tokens(self.tokenizer, frame.opening + questions[0].haystack)
        ids = torch.tensor([context], device=self.model.device)
        read = cache_of(self.model(ids, use_cache=True, logits_to_keep=1))
        # Those of one number of tokens go together, so that nothing is padded.
        alike: dict[tuple[int, bool, int], list[tuple[Question, list[int]]]] = {}
        for q in questions:
            ask, begin = ASKED["thread" if q.task.startswith("thread-") else q.task]
            keys = ", ".join(f'"{key}"' for key in q.keys)
            begin = begin.format(key=q.keys[0] if q.keys else "")
            text = f"\n\n{ask}\n" + (f"Keys: {keys}\n" if keys else "") + f"{frame.closing}{begin}"
            behind = tokens(self.tokenizer, text)
            group = (len(behind), "[" in begin, len(q.keys) or SEVERAL)
            alike.setdefault(group, []).append((q, behind))
        found: dict[Question, tuple[str, ...]] = {}
        for (_, listed, wanted), some in alike.items():
            said = self._said(copy.deepcopy(read), [behind for _, behind in some], wanted, listed)
            found.update(zip((q for q, _ in some), said, strict=True))
        return found

    def _said(
        self, cache: Any, rows: list[list[int]], wanted: int, listed: bool
    ) -> list[tuple[str, ...]]:
        """Greedy answers, each until its list, or its one value, has ended."""
        cache.batch_repeat_interleave(len(rows))
        ids = torch.tensor(rows, device=self.model.device)
        produced = torch.empty(len(rows), 0, dtype=torch.long)
        texts = [""] * len(rows)
        for _ in range((self.size + 6) * wanted):
            out = self.model(ids, use_cache=True, logits_to_keep=1, **with_cache(self.model, cache))
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            produced = torch.cat([produced, ids.cpu()], dim=1)
            texts = [self.tokenizer.decode(row) for row in produced.tolist()]
            if all(("]" if listed else '"') in text for text in texts):
                break
        if not listed:
            return [(text.partition('"')[0],) for text in texts]
        return [tuple(re.findall(r'"([^"]*)"', '"' + text.partition("]")[0])) for text in texts]


# The decoder that is trained on one needle ----------------------------------------------------------


def _plan(system: NeedleThreading) -> Any:
    from attlas.train.plan import Plan, parse_mechanisms

    return Plan(
        task="one-needle", mechanisms=parse_mechanisms([system.mechanism]), seeds=1,
        steps=system.train_steps, batch=64, accumulate=1, rate=3e-3, dim=64, layers=2, heads=4,
        tested=512, save=system.train_steps, device="cpu", dtype="float32",
    )  # fmt: skip


def _task(system: NeedleThreading) -> OneNeedle:
    """The task whose rows are as long as the haystacks, which give or take a pair."""
    name = "0" * system.size
    per = len(text_of([(name, name)] * 2)) - len(text_of([(name, name)]))
    pairs = [max(SEVERAL, length // per) for length in system.lengths]
    return OneNeedle(fewest=max(SEVERAL, min(pairs) - 1), pairs=max(pairs), symbols=10**system.size)


def _trained(system: NeedleThreading, seed: int, tick: Callable[[float], None]) -> torch.nn.Module:
    from attlas.train.loop import Trainer, TrainingBench
    from attlas.train.plan import Run
    from attlas.train.run import accelerated

    plan, done = _plan(system), 0

    def told(steps: int, loss: float) -> None:
        nonlocal done
        done += steps
        tick(done / plan.steps)

    # A folder of its own: what an earlier run left must not be resumed.
    with tempfile.TemporaryDirectory() as folder:
        bench = TrainingBench(plan, _task(system), accelerated("cpu", "float32"), Path(folder), told)
        trainer = Trainer(bench, Run(plan.mechanisms[0].label, seed))
        trainer.train()
    return trainer.net.eval()


def _net(system: NeedleThreading, seed: int) -> torch.nn.Module:
    from attlas.train.build import build

    return build(_task(system), _plan(system).mechanisms[0], _plan(system), seed).eval()


@torch.inference_mode()
def _read_symbols(net: torch.nn.Module, question: Question) -> tuple[str, ...]:
    """The trained decoder's answer: the key follows the pairs, and the next token is its value."""
    size = len(question.keys[0])
    pairs = json.loads(question.haystack).items()
    ids = [int(name) if len(name) == size else 10**size for pair in pairs for name in pair]
    logits, _ = net({"input_ids": torch.tensor([[*ids, int(question.keys[0])]])})
    return (f"{int(logits[0, -1, : 10**size].argmax()):0{size}d}",)
