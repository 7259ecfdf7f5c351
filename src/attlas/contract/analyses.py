"""The checks of analyses: on a small random model they repeat, are sound, leave no trace, and refuse."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from attlas.contract.measure import Measure, check, holds, refuses
from attlas.contract.measure import Subject as Tried
from attlas.contract.parts import prompt, small_llama
from attlas.errors import UserError
from attlas.inspect.prompts import Prompts
from attlas.inspect.subject import Subject
from attlas.kinds.analysis import Analysis, Findings

#: Rounding: rotations are worked out in single precision, and sums run in another order.
CLOSE = 1e-6


def sample(needs: str) -> Subject:
    """A small random Llama, or a ViT of ours for pictures, with what an analysis needs."""
    if needs == "pictures":
        return Subject(small_vit(), pixel_values=pictures(), labels=torch.tensor([0, 2, 1]))
    ids = prompt(12, batch=2)
    if needs == "prompts":
        corrupted = ids.clone()
        corrupted[:, 4] = (ids[:, 4] + 7) % 60 + 2
        answers = torch.tensor([[5, 9], [11, 3]])
        # Few layers: an analysis of prompts may run the model for each head.
        return Subject(small_llama(layers=2), prompts=Prompts(ids, corrupted, answers))
    return Subject(small_llama(), input_ids=ids if needs == "text" else None)


class Letters:
    """A tokenizer of single characters, for the small models: numbers from 2 to 63."""

    chat_template = None
    all_special_ids: tuple[int, ...] = ()

    def __call__(self, text: str, **given: Any) -> dict[str, list[int]]:
        """The number of each character."""
        return {"input_ids": [2 + ord(letter) % 62 for letter in text]}

    def __len__(self) -> int:
        return 64

    def decode(self, ids: Any) -> str:
        """Characters of these numbers, a line's end among them."""
        known = {2 + ord(letter) % 62: letter for letter in "\n0123456789 abcdefghijklmnopqrstuvwxyz"}
        return "".join(known.get(int(n), "?") for n in ids)

    def batch_decode(self, rows: Any) -> list[str]:
        """The same row by row."""
        return [self.decode(row) for row in rows]


def small_vit() -> Any:
    """A ViT of ours with random weights: 2 layers of 2 heads, 3 classes, 16 patches."""
    from attlas.models.vit import ViT, ViTConfig

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16,
        patch_size=4, num_labels=3, initializer_range=0.3,
    )  # fmt: skip
    return ViT(config).to(torch.float64).eval()


def pictures() -> Tensor:
    """Three random pictures for it."""
    torch.manual_seed(1)
    return torch.randn(3, 3, 16, 16, dtype=torch.float64)


def _subject(tried: Tried) -> Subject:
    own: Subject | None = tried.object.sample()
    return sample(tried.object.needs) if own is None else own


def takes_text(tried: Tried) -> bool:
    """Whether it is given texts."""
    return bool(tried.object.needs == "text")


def takes_something(tried: Tried) -> bool:
    """Whether it is given anything besides the weights."""
    return bool(tried.object.needs != "weights")


@check("analysis", poisoned=False)
def repeats(tried: Tried) -> Iterator[Measure]:
    """Twice with one seed it finds the same to the bit."""
    subject = _subject(tried)
    first, again = (_numbers(tried.made().look(subject)) for _ in range(2))
    yield holds("names", first.keys() == again.keys(), f"found {sorted(first)}, then {sorted(again)}")
    for name, values in first.items():
        alike = torch.equal(values.nan_to_num(nan=-7.0), again[name].nan_to_num(nan=-7.0))
        yield holds(name, alike, "the same seed found another thing")


@check("analysis", poisoned=False)
def findings_sound(tried: Tried) -> Iterator[Measure]:
    """It finds something: numbers that are finite or said to be missing, each with its meaning."""
    found: Findings = tried.made().look(_subject(tried))
    anything = found.heads or found.arrays or found.tables or found.says
    yield holds("something", bool(anything), "it found nothing at all")
    for name, scores in found.heads.items():
        values = scores.values
        yield holds(name, bool(scores.meaning.strip()), "no meaning")
        yield holds(name, not bool(values.isinf().any()), "an infinite score")
        yield holds(name, not bool(values.isnan().all()), "no head has a score")
        yield holds(name, not values.requires_grad, "scores carry a gradient")
    for name, values in found.arrays.items():
        sound = not values.is_floating_point() or bool(values.isfinite().all())
        yield holds(name, sound, "an array with NaN or infinities")
    for table in found.tables:
        widths = {len(row) for row in table.rows}
        yield holds(table.title, widths <= {len(table.columns)}, f"rows of {widths} cells")
    for sentence in found.says:
        yield holds("sentence", bool(sentence.strip()), "an empty sentence")


@check("analysis", poisoned=False)
def leaves_no_trace(tried: Tried) -> Iterator[Measure]:
    """Weights, modes, gradients, hooks and random numbers are as if nothing had run."""
    subject = _subject(tried)
    subject.model.train()
    state = {name: weight.clone() for name, weight in subject.model.state_dict().items()}
    before, drawn = _traces(subject.model), torch.get_rng_state()
    tried.made().look(subject)
    for name, weight in subject.model.state_dict().items():
        yield Measure(name, float((weight - state[name]).abs().max()), 0.0)
    after = _traces(subject.model)
    for what, value in before.items():
        yield holds(what, after[what] == value, f"{what} changed")
    yield holds("random state", torch.equal(drawn, torch.get_rng_state()), "the generator moved")


def _traces(model: nn.Module) -> dict[str, Any]:
    modules = list(model.modules())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules]
    return {
        "hooks": hooks,
        "modes": [m.training for m in modules],
        "own forwards": ["forward" in vars(m) for m in modules],
        "asked gradients": [p.requires_grad for p in model.parameters()],
        "gradients": [p.grad is None for p in model.parameters()],
    }


@check("analysis", when=takes_text, poisoned=False)
def padding(tried: Tried) -> Iterator[Measure]:
    """Padding on the left changes nothing of what it says of heads, or is refused by name."""
    subject = _subject(tried)
    ids = subject.input_ids
    assert ids is not None
    blank = torch.zeros_like(ids[:, :3])
    there = torch.cat([blank, torch.ones_like(ids)], dim=1)
    padded = replace(subject, input_ids=torch.cat([blank, ids], dim=1), attention_mask=there)
    try:
        found = tried.made().look(padded)
    except UserError as error:
        yield holds("refused", "padding" in str(error), f"refused without naming padding: {error}")
        return
    plain = tried.made().look(subject)
    for name, scores in plain.heads.items():
        ours, theirs = found.heads[name].values, scores.values
        yield holds(name, torch.equal(ours.isnan(), theirs.isnan()), "other heads have scores")
        worst = (ours - theirs).nan_to_num().abs().max() / theirs.nan_to_num().abs().max().clamp(min=1.0)
        yield Measure(name, float(worst), CLOSE)
    yield holds("names", found.heads.keys() == plain.heads.keys(), "padding changes what is found")


@check("analysis", poisoned=False)
def own_models(tried: Tried) -> Iterator[Measure]:
    """It works on attlas's own decoder, or refuses it in a sentence."""
    from attlas.models.decoder import Decoder, DecoderConfig

    subject = _subject(tried)
    if tried.object.needs == "pictures":
        yield holds("a ViT of ours", True, "")
        return
    torch.manual_seed(0)
    config = DecoderConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    ours = replace(subject, model=Decoder(config).to(torch.float64).eval())
    try:
        found = tried.made().look(ours)
    except UserError as error:
        yield holds("refused", bool(str(error)), "refused without a word")
        return
    yield holds("found", bool(_numbers(found) or found.tables or found.says), "nothing was found")


@check("analysis", when=takes_something, poisoned=False)
def needs_told(tried: Tried) -> Iterator[Measure]:
    """Without what it needs it says so before anything runs."""
    bare = Subject(_subject(tried).model)
    yield refuses("nothing given", lambda: tried.made().look(bare), tried.object.needs)


@check("analysis", poisoned=False)
def described(tried: Tried) -> Iterator[Measure]:
    """Its docstring says what it is, and what it needs is known."""
    yield holds("docstring", bool(inspect.getdoc(tried.object)), "no docstring")
    known = tried.object.needs in ("weights", "text", "prompts", "pictures")
    yield holds("needs", known, f"needs {tried.object.needs!r}")
    yield holds("an analysis", issubclass(tried.object, Analysis), "it derives from something else")


def _numbers(found: Findings) -> dict[str, Tensor]:
    heads = {name: scores.values for name, scores in found.heads.items()}
    return heads | dict(found.arrays)
