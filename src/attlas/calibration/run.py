"""`calibrate`: read texts with a model, gather what a part needs, lose nothing when interrupted."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from attlas.attach import attach
from attlas.calibration.parts import Calibrated, Calibrator
from attlas.calibration.statistics import Calibration
from attlas.errors import UserError, at_least_one
from attlas.storage.files import fingerprint
from attlas.tasks.text import passage

#: Told how many pieces of the work are done, of how many.
Tick = Callable[[int, int], None]


@runtime_checkable
class Fits(Protocol):
    """A part whose statistics are optimised and not summed."""

    def fit(
        self, model: nn.Module, texts: Sequence[Tensor], tick: Tick, partial: Path | None
    ) -> dict[str, Tensor]:
        """The finished statistics; what is done so far is kept in `partial` and resumed from."""
        ...


def windows(
    tokenizer: Any,
    text: str | None = None,
    *,
    tokens: int = 16384,
    length: int = 1024,
    seed: int = 0,
) -> list[Int[Tensor, "1 length"]]:
    """Token numbers to calibrate on: passages of `length` tokens, `tokens` in all.

    Args:
        tokenizer: the model's.
        text: any text; passages of Shakespeare, drawn by the seed, unless given.
        tokens: tokens in all, rounded up to whole passages.
        length: tokens of a passage.
        seed: of the drawing.

    Raises:
        ValueError: a number below 1, or a text shorter than one passage.
    """
    at_least_one("length", length)
    count = -(-at_least_one("tokens", tokens) // length)
    if text is None:
        rng = random.Random(seed)
        texts = [passage(rng, 8 * length) for _ in range(count)]
        ids = [_numbers(tokenizer, one)[:length] for one in texts]
    else:
        whole = _numbers(tokenizer, text)
        if len(whole) < length:
            raise UserError(
                f"the text holds {len(whole)} tokens, fewer than one passage of length={length}"
            )
        ids = [whole[i : i + length] for i in range(0, len(whole) - length + 1, length)][:count]
    return [torch.tensor([one]) for one in ids]


def _numbers(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def calibrate(
    model: nn.Module,
    part: Calibrated,
    texts: Sequence[Int[Tensor, "1 _"]],
    *,
    partial: Path | None = None,
    tick: Tick = lambda done, total: None,
) -> Calibration:
    """Statistics of `model` for `part`, from texts.

    Args:
        model: a Transformers model.
        part: with the options that it will be attached with.
        texts: token numbers, as `windows` gives them.
        partial: a file that keeps what was read, so that an interrupted calibration goes on there.
        tick: told of the texts read.

    Raises:
        ValueError: no texts.
        TypeError: a part that needs no calibration.
    """
    if not isinstance(part, Calibrated):
        raise TypeError(f"{type(part).__name__} needs no calibration")
    if not texts:
        raise UserError("calibrate takes at least one text, got none")
    about = {"texts": len(texts), "tokens": sum(t.shape[1] for t in texts)}
    if isinstance(part, Fits):
        tensors = part.fit(model, texts, tick, partial)
    else:
        tensors = _gathered(model, part, texts, partial, tick)
    if partial is not None:
        partial.unlink(missing_ok=True)
    tensors = {name: t.detach().cpu() for name, t in tensors.items()}
    return Calibration(part.calibration_key, fingerprint(model), tensors, about)


def _gathered(
    model: nn.Module, part: Calibrated, texts: Sequence[Tensor], partial: Path | None, tick: Tick
) -> dict[str, Tensor]:
    calibrator, key = part.calibrator(), f"{part.calibration_key} {_digest(texts)}"
    done = _resumed(calibrator, partial, key, model)
    device = next(model.parameters()).device
    tick(done, len(texts))
    with torch.no_grad(), attach(model, calibrator):
        for number in range(done, len(texts)):
            model(texts[number].to(device), use_cache=False, logits_to_keep=1)
            if partial is not None:
                about = {"done": number + 1}
                Calibration(key, fingerprint(model), calibrator.sums, about).save(partial)
            tick(number + 1, len(texts))
    return calibrator.tensors()


def _resumed(calibrator: Calibrator, partial: Path | None, key: str, model: nn.Module) -> int:
    """How many texts an interrupted calibration has read; none if it was another."""
    if partial is None or not partial.exists():
        return 0
    try:
        found = Calibration.load(partial)
        found.check(key, model, str(partial))
    except UserError:  # of other texts, or cut short: begin again
        return 0
    calibrator.sums = found.tensors
    return int(found.about["done"])


def _digest(texts: Sequence[Tensor]) -> str:
    numbers = torch.cat([t.flatten() for t in texts]).to(torch.int64).cpu()
    return hashlib.sha256(numbers.numpy().tobytes()).hexdigest()[:16]
