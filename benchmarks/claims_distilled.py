"""What adapters that imitate a model's attention are claimed to do: ChunkLLM, SEA.

    python benchmarks/claims_distilled.py [NAME ...] [--seeds 3] [--device cuda] [--out FOLDER]

SmolLM2-135M, frozen, is imitated on Shakespeare and on markets (texts that say who sells what where), and
judged on others of both.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

import attlas
from attlas.kinds.expect import Expectation, Row, Within
from attlas.models.load import load_tokenizer
from attlas.tasks.text import shakespeare
from claims_tuning import fitted, main, question

LENGTH, STEPS, ROWS, HELD_OUT, ASKED = 192, 80, 4, 0.1, 100


def texts(tokenizer: Any, held_out: bool, rows: int, rng: random.Random) -> Tensor:
    """Windows of the plays, from their beginning or from their end."""
    whole = shakespeare()
    border = round((1 - HELD_OUT) * len(whole))
    found = []
    for _ in range(rows):
        at = rng.randrange(border, len(whole) - 8 * LENGTH) if held_out else rng.randrange(border)
        found.append(tokenizer(whole[at : at + 8 * LENGTH])["input_ids"][1 : LENGTH + 1])
    return torch.tensor(found)


def markets(tokenizer: Any, rows: int, rng: random.Random) -> Tensor:
    """As many tokens of questions and their answers."""
    found = []
    for _ in range(rows):
        ids: list[int] = []
        while len(ids) < LENGTH:
            passages, asked, answer = question(rng, tokenizer)
            ids += [*chain(*passages), *asked, answer]
        found.append(ids[:LENGTH])
    return torch.tensor(found)


def right(model: Any, tests: list[Any]) -> float:
    """% of questions whose answer begins right."""
    count = 0
    for passages, asked, answer in tests:
        ids = torch.tensor([[*chain(*passages), *asked]], device=model.device)
        with torch.no_grad():
            count += int(model(ids, use_cache=False).logits[0, -1].argmax()) == answer
    return 100 * count / len(tests)


def chunkllm(seed: int, device: str) -> Iterator[Row]:
    model, tokenizer = attlas.load("smollm2").to(device).float(), load_tokenizer("smollm2")
    tests = [question(random.Random(f"test/{seed}/{n}"), tokenizer) for n in range(ASKED)]
    yield Row("full attention, answers", whole := right(model, tests), " %")
    ends = [i for t, i in tokenizer.get_vocab().items() if any(sign in t for sign in ".!?")]
    torch.manual_seed(seed)
    # Twenty sentences are in a prompt of markets: half of the cache.
    adapter, rng = attlas.make("chunkllm", ends=ends, keep=10), random.Random(seed)
    adapter.inject(model)
    held_out = texts(tokenizer, True, 16, random.Random(f"held out/{seed}")).to(device)

    def recalled(keep: int) -> float:
        adapter.keep, before = keep, adapter.keep
        found = adapter.recall(model, held_out)
        adapter.keep = before
        return 100 * found

    def loss(step: int) -> Tensor:
        both = texts(tokenizer, False, ROWS // 2, rng), markets(tokenizer, ROWS // 2, rng)
        return adapter.loss(model, torch.cat(both).to(device), step / STEPS)

    yield Row("recall of 4, untrained", recalled(4), " %")
    fitted(adapter.trainable().values(), STEPS, 3e-3, loss)
    yield Row("recall of 4", recalled(4), " %")
    yield Row("recall of 8", recalled(8), " %")
    states, _ = adapter.taught(model, held_out)
    told = adapter.parts.ends(states[-1])[..., 0] > 0
    yield Row("ends told right", 100 * float((told == adapter.labels(held_out)).float().mean()), " %")
    yield Row("half the cache, answers", half := right(model, tests), " %")
    yield Row("answers below full attention", whole - half, " points", "lower")


CLAIMS: dict[str, tuple[Any, str, str, tuple[Expectation, ...]]] = {
    "chunkllm": (
        chunkllm, "trained, it chooses more than 85 % of the model's heaviest chunks, and with half of "
        "the cache answers within 5 points of full attention",
        f"SmolLM2-135M, {STEPS} steps of {ROWS} texts of {LENGTH} tokens; chunks of 16 held-out windows "
        f"of Shakespeare; {ASKED} questions about 20 sentences, of which 10 are read",
        (Within("recall of 4", least=85.0), Within("answers below full attention", most=5.0)),
    ),
}  # fmt: skip


def claimed(name: str) -> tuple[str, tuple[Expectation, ...]]:
    """What is claimed of a mechanism, and when it holds."""
    _, says, _, expects = CLAIMS[name]
    return says, expects


if __name__ == "__main__":
    main(CLAIMS, "claims_distilled")
