"""What adapters that imitate a model's attention are claimed to do: ChunkLLM, SEA.

    python benchmarks/claims_distilled.py [NAME ...] [--seeds 3] [--device cuda] [--out FOLDER]

SmolLM2-135M, frozen, is imitated on windows of Shakespeare, some with a needle, and judged on others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import attlas
from attlas.kinds.expect import Expectation, Row, Within
from attlas.models.load import load_tokenizer
from attlas.tasks.text import shakespeare
from claims_tuning import GOODS, PLACES, fitted, main

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


def needle(tokenizer: Any, held_out: bool, rng: random.Random) -> tuple[list[int], int]:
    """(a window of the plays with a sentence put between two of its own, and that sentence again up to
    its last word; that word's first token)."""
    window = tokenizer.decode(texts(tokenizer, held_out, 1, rng)[0, : LENGTH - 24])
    sentences, word = window.split(". "), rng.choice(GOODS)
    sentences.insert(rng.randrange(len(sentences)), f"The secret word of {rng.choice(PLACES)} is {word}")
    told = ". ".join(sentences)
    asked = told[told.index("The secret word of ") :].split(" is ")[0] + " is"
    ids: list[int] = tokenizer(f"{told}\n{asked}")["input_ids"]
    return ids, tokenizer(f" {word}")["input_ids"][0]


def needles(tokenizer: Any, rows: int, rng: random.Random) -> Tensor:
    """Windows with a needle and its answer, cut in front to one length."""
    found = [needle(tokenizer, False, rng) for _ in range(rows)]
    rows_of = [[*ids, answer] for ids, answer in found]
    shortest = min(map(len, rows_of))
    return torch.tensor([ids[-shortest:] for ids in rows_of])


def right(model: Any, tests: list[Any], adapter: Any = None) -> float:
    """% of needles found; of the chunks that an adapter chooses among, half are read."""
    count = 0
    for told, answer in tests:
        ids = torch.tensor([told], device=model.device)
        if adapter is not None:
            adapter.keep = max(1, int(adapter.labels(ids).sum()) // 2)
        with torch.no_grad():
            count += int(model(ids, use_cache=False).logits[0, -1].argmax()) == answer
    return 100 * count / len(tests)


def chunkllm(seed: int, device: str) -> Iterator[Row]:
    model, tokenizer = attlas.load("smollm2").to(device).float(), load_tokenizer("smollm2")
    tests = [needle(tokenizer, True, random.Random(f"test/{seed}/{n}")) for n in range(ASKED)]
    yield Row("full attention, needles", whole := right(model, tests), " %")
    ends = [i for t, i in tokenizer.get_vocab().items() if any(sign in t for sign in ".!?")]
    torch.manual_seed(seed)
    adapter, rng = attlas.make("chunkllm", ends=ends), random.Random(seed)
    adapter.inject(model)
    held_out = texts(tokenizer, True, 16, random.Random(f"held out/{seed}")).to(device)

    def recalled(keep: int) -> float:
        adapter.keep = keep
        return 100 * adapter.recall(model, held_out)

    def loss(step: int) -> Tensor:
        some = texts(tokenizer, False, ROWS, rng) if step % 2 else needles(tokenizer, ROWS, rng)
        return adapter.loss(model, some.to(device), step / STEPS)

    yield Row("recall of 4, untrained", recalled(4), " %")
    fitted(adapter.trainable().values(), STEPS, 3e-3, loss)
    yield Row("recall of 4", recalled(4), " %")
    yield Row("recall of 8", recalled(8), " %")
    states, _ = adapter.taught(model, held_out)
    told = adapter.parts.ends(states[-1])[..., 0] > 0
    yield Row("ends told right", 100 * float((told == adapter.labels(held_out)).float().mean()), " %")
    yield Row("half the cache, needles", half := right(model, tests, adapter), " %")
    yield Row("needles below full attention", whole - half, " points", "lower")


CLAIMS: dict[str, tuple[Any, str, str, tuple[Expectation, ...]]] = {
    "chunkllm": (
        chunkllm, "trained, it chooses more than 85 % of the model's heaviest chunks, and with half of "
        "the cache finds needles within 5 points of full attention",
        f"SmolLM2-135M, {STEPS} steps of {ROWS} texts of {LENGTH} tokens; chunks of 16 held-out windows "
        f"of Shakespeare; {ASKED} needles in others, of whose chunks half are read",
        (Within("recall of 4", least=85.0), Within("needles below full attention", most=5.0)),
    ),
}  # fmt: skip


def claimed(name: str) -> tuple[str, tuple[Expectation, ...]]:
    """What is claimed of a mechanism, and when it holds."""
    _, says, _, expects = CLAIMS[name]
    return says, expects


if __name__ == "__main__":
    main(CLAIMS, "claims_distilled")
