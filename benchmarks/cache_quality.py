"""What cache methods keep of a language model: many rows at once, so that a cell has a hundred needles.

    python benchmarks/cache_quality.py --model smollm2 --out benchmarks/cache [--at-once 8]
    python benchmarks/cache_quality.py --model smollm2 --export rows.json     the prompts alone

The texts, questions and scores are those of `attlas compare` (`attlas.tasks.haystack`), which asks one
after the other; here all that have equally many tokens are read as one batch. A cell is a method at
a length: 100 needles with the question in the prompt and 100 asked afterwards (`blind`), 100 of
several, and 32 continuations of 128 tokens that are predicted one after the other. Lines that are in
the folder already are not measured again. `which_cache.py` makes the page of them.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attlas
from attlas.attach.session import bytes_read, cache_bytes
from attlas.cache.prompt import Prompt, prefill
from attlas.compare.machine import machine, versions
from attlas.compare.methods import FULL, parse_method
from attlas.compare.shared import attached, cache_parts, forward, shares, stepwise
from attlas.hf.caches import cache_of
from attlas.models.load import load_tokenizer
from attlas.tasks.compare.fidelity import divergence
from attlas.tasks.continuation import continuation
from attlas.tasks.haystack import ANSWER_TOKENS, correct, finished, several, single
from attlas.tasks.record import Measure, mean, share

LENGTHS = (1024, 4096)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
#: Needles a depth, continuations, and tokens that are predicted in each.
NEEDLES, TEXTS, PREDICTED = 20, 32, 128
#: Tokens of context that are read at once.
ROOM = 1 << 17
#: The options of SnapKV with which other libraries begin.
OTHERS = {"window": 64, "kernel": 5, "pooling": "avg"}
METHODS = (
    FULL,
    *(f"streaming-llm(keep={keep})" for keep in (0.5, 0.25)),
    *(f"{name}(keep={keep})" for name in ("snapkv", "tova", "ada-kv") for keep in (0.5, 0.25, 0.125)),
    *(f"ada-kv(keep={keep}, scorer_options={OTHERS})" for keep in (0.5, 0.25, 0.125)),
    *(f"{name}(keep={keep})" for name in ("expected-attention", "observed-attention")
      for keep in (0.5, 0.25)),
    "pyramid-kv(keep=0.25)",
    *(f"snapkv(keep={keep}, window={w}, kernel={k}, pooling='{p}')"
      for keep in (0.25, 0.125) for w, k, p in ((16, 7, "max"), (64, 5, "avg"), (32, 5, "avg"))),
    "key-norm-eviction(keep=0.5)",
    *(f"balancekv(keep={keep})" for keep in (0.5, 0.25)),
    *(f"quantized-cache(bits={bits})" for bits in (8, 4, 3, 2)),
    *(f"quest-page-selection(keep={keep})" for keep in (0.25, 0.125)),
    "snapkv(keep=0.5)+quantized-cache(bits=4)",
)  # fmt: skip
#: Methods that draw random numbers are measured with so many seeds, which are pooled.
RANDOM, SEEDS = ("balancekv",), 3


@dataclass(frozen=True)
class Row:
    """A context, and a question about it."""

    task: str
    context: list[int]
    question: list[int]
    number: str


def rows(tokenizer: Any, length: int, seed: int) -> list[Row]:
    """All that are asked at a length."""
    found = []
    for number in range(NEEDLES):
        for depth in DEPTHS:
            hay = single(tokenizer, length, depth, f"{seed}-{length}-{depth}-{number}")
            found += [Row("single", hay.context, k.question, k.number) for k in hay.asked]
        hay = several(tokenizer, length, DEPTHS, f"{seed}-{length}-several-{number}")
        found += [Row("several", hay.context, k.question, k.number) for k in hay.asked]
    return found


def batches(asked: Sequence[Row], length: int) -> Iterator[list[Row]]:
    """Rows that can be read together: one task, and questions of one length."""
    alike: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in asked:
        alike[row.task, len(row.question)].append(row)
    most = max(1, ROOM // length)
    for group in alike.values():
        yield from (group[at : at + most] for at in range(0, len(group), most))


class Read:
    """A batch that was read: its cache as the method keeps it, as often as it is asked for."""

    def __init__(self, model: Any, parts: tuple[Any, ...], ids: Tensor) -> None:
        self.model, self.parts, self.ids = model, parts, ids
        sharing = [cache_parts(parts)] if parts else []
        self.prompt: Prompt | None = prefill(model, ids, sharing) if shares(parts) else None

    def extended(self, more: Tensor) -> Read:
        other = object.__new__(Read)
        other.model, other.parts = self.model, self.parts
        other.ids = torch.cat([self.ids, more], dim=1)
        other.prompt = None if self.prompt is None else self.prompt.extend(self.model, more)
        return other

    def fork(self) -> tuple[Any, Tensor]:
        """(the cache, the next logits); inside `attached`."""
        if self.prompt is not None:
            return self.prompt.fork(cache_parts(self.parts)), self.prompt.logits
        output = forward(self.model, self.ids, None)
        return cache_of(output), output.logits[:, -1]


def answers(model: Any, tokenizer: Any, cache: Any, logits: Tensor) -> list[str]:
    """Greedy answers of a batch; a row that has said a number goes on, unheard."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    said: list[list[int]] = [[] for _ in logits]
    done = [False] * len(said)
    for _ in range(ANSWER_TOKENS):
        ids = logits.argmax(-1, keepdim=True)
        for row, token in enumerate(ids[:, 0].tolist()):
            done[row] = done[row] or token in ends
            if not done[row]:
                said[row].append(token)
                done[row] = finished(tokenizer.decode(said[row]))
        if all(done):
            break
        logits = forward(model, ids, cache).logits[:, -1]
    return [tokenizer.decode(each) for each in said]


@torch.no_grad()
def cell(model: Any, tokenizer: Any, label: str, length: int, seed: int) -> dict[str, Measure]:
    """All numbers of a method at a length."""
    torch.manual_seed(seed)
    parts, device = parse_method(label).parts(), model.device
    hits: dict[str, list[bool]] = defaultdict(list)
    with attached(model, parts):
        pass  # what it refuses, it refuses before anything is read
    for batch in batches(rows(tokenizer, length, 0), length):
        read = Read(model, parts, torch.tensor([row.context for row in batch], device=device))
        question = torch.tensor([row.question for row in batch], device=device)
        asked = read.extended(question)
        with attached(model, parts):
            told = [(batch[0].task, *asked.fork())]
            if batch[0].task == "single":
                cache, _ = read.fork()
                told.append(("blind", cache, forward(model, question, cache).logits[:, -1]))
            for task, cache, logits in told:
                found = answers(model, tokenizer, cache, logits)
                hits[task] += map(correct, batch, found)
    found = {task: share(sum(each), len(each)) for task, each in hits.items()}
    return found | _continued(model, tokenizer, parts, length)


def _continued(model: Any, tokenizer: Any, parts: tuple[Any, ...], length: int) -> dict[str, Measure]:
    """Nats from full attention, of the true text, and bytes; intervals are over the texts."""
    device = model.device
    texts = [continuation(tokenizer, length, PREDICTED, f"0-{length}-text-{n}") for n in range(TEXTS)]
    kl, same, nats, more, held, seen = ([] for _ in range(6))
    most = max(1, ROOM // length)
    for at in range(0, TEXTS, most):
        some = texts[at : at + most]
        read = Read(model, parts, torch.tensor([t.context for t in some], device=device))
        plain = Read(model, (), read.ids)
        fed = torch.tensor([t.fed for t in some], device=device)
        targets = torch.tensor([t.targets for t in some], device=device)
        full = forward(model, fed, plain.fork()[0], logits=0).logits
        with attached(model, parts):
            cache, _ = read.fork()
            held.append(cache_bytes(cache) / len(some))
            pieces = fed.split(1, dim=1) if stepwise(parts) else (fed,)
            ours = torch.cat([forward(model, p, cache, logits=0).logits for p in pieces], dim=1)
            if not stepwise(parts):  # what a single token reads
                forward(model, fed[:, -1:], cache)
            seen.append(bytes_read(cache) / len(some))
        for one, other, target in zip(full, ours, targets, strict=True):
            kl.append(divergence(one, other).mean().item())
            same.append((one.argmax(-1) == other.argmax(-1)).float().mean().item())
            losses = [
                torch.nn.functional.cross_entropy(x.float(), target).item() for x in (one, other)
            ]
            nats.append(losses[1])
            more.append(losses[1] - losses[0])
    return {
        "kl": mean(kl), "top1": mean(same), "nats": mean(nats), "more_nats": mean(more),
        "cache_bytes": Measure(sum(held) / len(held), TEXTS),
        "read_bytes": Measure(sum(seen) / len(seen), TEXTS),
    }  # fmt: skip


def measured(model_name: str, label: str, lengths: Sequence[int], out: Path, device: str) -> None:
    """One method at all lengths, a line at once for each; what is there already is left."""
    path = out / f"{model_name}-{re.sub(r'[^a-z0-9.]+', '-', label.lower()).strip('-')}.jsonl"
    there = path.read_text().splitlines() if path.exists() else []
    done = {(line["length"], line["seed"]) for line in map(json.loads, there)}
    model, tokenizer = attlas.load(model_name).to(device), load_tokenizer(model_name)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    seeds = range(SEEDS) if label.partition("(")[0] in RANDOM else range(1)
    for length in lengths:
        for seed in seeds:
            if (length, seed) in done:
                continue
            start = time.perf_counter()
            try:
                found, status = cell(model, tokenizer, label, length, seed), "ok"
            except (ValueError, torch.cuda.OutOfMemoryError) as error:
                found, status = {}, f"{type(error).__name__}: {error}"
            line = {
                "model": model_name, "method": label, "length": length, "seed": seed,
                "status": status, "seconds": round(time.perf_counter() - start, 1),
                "dtype": str(dtype).removeprefix("torch."), "machine": machine(torch.device(device)),
                "versions": versions(),
                "numbers": {
                    name: {"value": m.value, "low": m.low, "high": m.high, "n": m.n}
                    for name, m in found.items()
                },
            }  # fmt: skip
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            told = {n: round(m.value, 4) for n, m in found.items() if math.isfinite(m.value)}
            print(model_name, label, length, seed, status, line["seconds"], told, flush=True)


def export(model_name: str, lengths: Sequence[int], out: Path) -> None:
    """The prompts as token ids, for libraries that run elsewhere."""
    tokenizer = load_tokenizer(model_name)
    told = {}
    for length in lengths:
        texts = [continuation(tokenizer, length, PREDICTED, f"0-{length}-text-{n}") for n in range(TEXTS)]
        told[str(length)] = {
            "rows": [vars(row) for row in rows(tokenizer, length, 0) if row.task == "single"],
            "texts": [{"context": t.context, "fed": t.fed, "targets": t.targets} for t in texts],
        }
    out.write_text(json.dumps(told))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "cache")
    parser.add_argument("--export", type=Path)
    parser.add_argument("--at-once", type=int, default=1, help="methods that are measured side by side")
    given = parser.parse_args()
    if given.export:
        export(given.model, given.lengths, given.export)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given.out.mkdir(parents=True, exist_ok=True)
    if given.at_once == 1:
        for label in given.methods:
            measured(given.model, label, given.lengths, given.out, device)
        return
    # A process for each, as Python is what most of them wait for.
    waiting, running = list(given.methods), []
    while waiting or running:
        running = [each for each in running if each.poll() is None]
        while waiting and len(running) < given.at_once:
            command = [sys.executable, __file__, "--model", given.model, "--methods", waiting.pop(0),
                       "--lengths", *map(str, given.lengths), "--out", str(given.out)]  # fmt: skip
            running.append(subprocess.Popen(command))
        time.sleep(0.2)


if __name__ == "__main__":
    main()
