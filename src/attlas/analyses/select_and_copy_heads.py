"""Select-and-copy heads: heads that look at the right option, whatever letter the model says.

    S_QK(i) = q_N · k_{t_i}        of each head, before the rotation and unscaled
    S_A(i)  = A[N, t_i]            its weight on the same token
    answer  = argmax_i S(i)

N is the prompt's last token, t_i the one that stands for option i: the end of its line. The head whose
answers are right most often on some labelled prompts answers the others. No code is published: that q
and k are taken before rotation is how we read the paper.

Cost: one pass over the prompts; the weights of the last query and keys of the options are kept.

Source: "Listening to the Wise Few: Select-and-Copy Attention Heads for Multiple-Choice QA".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from attlas.attach.call import Call, ForwardPass
from attlas.attach.part import Recorder
from attlas.cache.rotations import rotation_of
from attlas.catalog.registry import mechanism
from attlas.errors import UserError
from attlas.inspect.choices import Choices, choices, right_share, spelling
from attlas.inspect.prompts import Prompts
from attlas.inspect.runs import logits_with
from attlas.kinds.analysis import Analysis, Findings, Scores, Table
from attlas.options import option
from attlas.parts.record.rows import repeated
from attlas.storage.rotary import Rotation

if TYPE_CHECKING:
    from attlas.inspect.subject import Subject


@mechanism(
    "option-scores", paper="select-and-copy-heads", example={"places": torch.tensor([2, 5, 9])}
)
class OptionScores(Recorder):
    """Records S_QK and S_A of the newest query, {"qk", "attention": [layers, batch, heads, options]}."""

    without = ("heads",)  # all heads are recorded

    places: Tensor = option(
        "tokens of the options, counted by each row's own valid ones, [options] or [rows, options]",
        kw_only=False,
    )

    def setup(self) -> None:
        """Nothing is recorded yet."""
        super().setup()
        if self.places.ndim not in (1, 2) or self.places.is_floating_point():
            raise UserError(f"places are whole numbers [options] or [rows, options], got {self.places}")
        self._rotations: dict[int, Rotation | None] = {}
        self._keys: dict[int, Tensor] = {}
        self._seen: dict[int, Tensor] = {}
        self._found: dict[str, dict[int, Tensor]] = {"qk": {}, "attention": {}}

    def check(self, model: nn.Module) -> None:
        """Find out how the model rotates."""
        config: Any = model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        wanted = range(int(config.num_hidden_layers))
        name = type(self).__name__
        self._rotations = {layer: rotation_of(model, layer, name) for layer in wanted}

    def begin(self, forward_pass: ForwardPass) -> None:
        """A call without a past begins a new sequence."""
        if forward_pass.offset == 0:
            for each in (self._keys, self._seen, *self._found.values()):
                each.clear()

    def observe(self, call: Call) -> None:
        """Keep keys of options among this call's tokens, and score them by its last query."""
        count, batch = call.q.shape[2], call.q.shape[0]
        ranks, there = call.rows.last(count, batch, call.q.device)
        here = (self._rows(batch, ranks)[:, :, None] == ranks[:, None]) & there[:, None]
        own = self._unrotated(call, call.k[:, :, -count:])
        keys = torch.einsum("bot,bktd->bkod", here.to(own), own)
        seen = here.any(dim=-1)
        if call.layer in self._keys:
            keys = keys + repeated(self._keys[call.layer], batch, self)
            seen = seen | repeated(self._seen[call.layer], batch, self)
        self._keys[call.layer], self._seen[call.layer] = keys, seen
        q = self._unrotated(call, call.q)[:, :, -1].unflatten(1, (keys.shape[1], -1))
        self._found["qk"][call.layer] = torch.einsum("bkgd,bkod->bkgo", q, keys).flatten(1, 2)

    def _unrotated(self, call: Call, x: Float[Tensor, "batch heads tokens dim"]) -> Tensor:
        rotation = self._rotations[call.layer]
        return x.float() if rotation is None else rotation.now().unrotate(x, call.positions)

    def _rows(self, batch: int, like: Tensor) -> Int[Tensor, "batch options"]:
        places = self.places.to(like)
        return repeated(places, batch, self) if places.ndim == 2 else places.expand(batch, -1)

    def update(self, call: Call, weights: Tensor, queries: Tensor, keys: Tensor) -> None:
        """Keep the last query's weights on the options."""
        if int(queries[-1]) != call.forward_pass.offset + call.q.shape[2] - 1:
            return
        batch = weights.shape[0]
        there, ranks = call.rows.at(keys.expand(batch, 1, -1) if keys.ndim == 1 else keys)
        options = self._rows(batch, ranks)[:, None, :, None]
        on = (options == ranks[:, :, None]) & there[:, :, None]
        self._found["attention"][call.layer] = (on * weights[:, :, -1:]).sum(dim=-1)

    def result(self) -> dict[str, Float[Tensor, "layers batch heads options"]]:
        """The scores.

        Raises:
            ValueError: an option that has not been read.
        """
        if not all(bool(seen.all()) for seen in self._seen.values()):
            raise UserError(f"places {self.places.tolist()}: some lie behind what has been read")
        return {n: torch.stack([f[x] for x in sorted(f)]) for n, f in self._found.items()}


@mechanism("select-and-copy-heads", example={"letters": (10, 11, 12), "mark": 3})
class SelectAndCopyHeads(Analysis):
    """Answers multiple choice by each head, choosing heads on the first half of the prompts.

    Prompts ask for a letter: `attlas inspect MODEL --task multiple-choice`, or stated-choice.
    """

    needs = "prompts"

    letters: tuple[int, ...] | None = option(
        "tokens of the letters, as many as options; the tokenizer's A to D unless given", default=None
    )
    mark: int | None = option("the token that ends an option; a line's end unless given", default=None)
    batch: int = option("prompts that are read at once", default=16, at_least=1)

    def run(self, subject: Subject, tick: Callable[[float], None]) -> Findings:
        """Scores of all prompts, the best head by either, and the letters' own answers."""
        assert subject.prompts is not None
        asked = self.asked(subject.prompts, subject)
        if len(asked) < 2:
            raise UserError("select-and-copy-heads chooses on half of the prompts; give two or more")
        scores, said = self.scores(subject.model, asked, tick)
        half = len(asked) // 2
        chosen, held = asked[:half], asked[half:]
        rows: list[tuple[str, str, float, float]] = []
        first, others = right_share(said[:half], chosen.right), right_share(said[half:], held.right)
        rows.append(("letters", "", float(first), float(others)))
        known = {n: right_share(s[:, :, :half], chosen.right) for n, s in scores.items()}
        for what, name in (("QK-score", "qk"), ("weights", "attention")):
            (layer, head), *_ = Scores(known[name], what).top(1)
            right = right_share(scores[name][layer, head, half:], held.right)
            rows.append((what, f"{layer}.{head}", float(known[name][layer, head]), float(right)))
        meanings = {
            "qk-score": "share of multiple-choice answers that its QK-score gets right",
            "option-weights": "share that its weights get right",
        }
        every = {"qk-score": scores["qk"], "option-weights": scores["attention"]}
        told = {n: Scores(right_share(s, asked.right), meanings[n]) for n, s in every.items()}
        columns = ("chosen by", "head", "on the first half", "on the others")
        return Findings(heads=told, tables=[Table("Right answers", columns, rows)])

    def asked(self, prompts: Prompts, subject: Subject) -> Choices:
        """The clean prompts with their options."""
        letters, mark = spelling(subject.tokenizer, self.letters, self.mark, "select-and-copy-heads")
        return choices(prompts.clean, prompts.answers[:, 0], letters, mark)

    def scores(
        self, model: nn.Module, asked: Choices, tick: Callable[[float], None] = lambda share: None
    ) -> tuple[dict[str, Tensor], Float[Tensor, "prompts options"]]:
        """(S_QK and S_A, [layers, heads, prompts, options], the logits of the letters)."""
        found, said = [], []
        for first in range(0, len(asked), self.batch):
            some = asked[first : first + self.batch]
            recorder = OptionScores(some.ends)
            said.append(some.letter_logits(logits_with(model, some.ids, recorder)))
            found.append(recorder.result())
            tick((first + len(some)) / len(asked))
        each = {n: torch.cat([f[n] for f in found], dim=1).transpose(1, 2) for n in found[0]}
        return each, torch.cat(said)

    @classmethod
    def sample(cls) -> Subject:
        """A small Llama and prompts with three options, which end with token 3."""
        from attlas.contract.parts import prompt, small_llama
        from attlas.inspect.subject import Subject

        ids = prompt(14, batch=4).where(prompt(14, batch=4) != 3, 4)
        ids[:, [3, 6, 9]] = 3
        answers = torch.tensor([[10, 11], [11, 12], [12, 10], [10, 12]])
        return Subject(small_llama(), prompts=Prompts(ids, ids.clone(), answers))
