"""Claims of DuoAttention and adaptive long-context heads, on SmolLM2: which heads must look far?

DuoAttention: gates that were fitted, random ones, and the fitted ones inverted, with half and a quarter
of the heads retrieving. A needle that is asked for in the prompt (`asked`) is found by the prompt's own
attention, which is exact with any gates, so that only its later digits tell gates apart; `blind` ones are
asked for when the streaming heads have forgotten.

Adaptive heads: whether a head looks far, decided by a Gaussian for all far keys, by one for every chunk
of them, and by the exact mass, while a passage is read again word for word far behind its first place.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import attlas
from attlas import prefill
from attlas.attach import attach
from attlas.cache.part import CachePart
from attlas.cache.row import scores_over
from attlas.cache.selection import keys_of
from attlas.calibration.run import calibrate, windows
from attlas.hf.caches import cache_of, with_cache
from attlas.kinds.expect import Beats, Expectation, Row, Within
from attlas.models.load import load_tokenizer
from attlas.parts.select.adaptive_long_context import AdaptiveLongContext, gaussian_mass
from attlas.tasks.continuation import continuation
from attlas.tasks.haystack import correct
from attlas.tasks.text import passage
from cache_quality import batches, rows

#: Tokens of a context, of an answer, and that are predicted of a text; rows that are read together.
LENGTH, ANSWER, PREDICTED, AT_ONCE = 4096, 6, 64, 32


def loaded(dtype: torch.dtype) -> tuple[Any, Any, str]:
    """SmolLM2, its tokenizer, and where it is."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return attlas.load("smollm2").to(device, dtype).eval(), load_tokenizer("smollm2"), device


# DuoAttention


def duo(cell: str, seed: int, quick: bool) -> Iterator[Row]:
    """Needles and perplexity by gates and share of streaming heads; 100 needles a seed."""
    model, tokenizer, _ = loaded(torch.float32)
    length, steps = (256, 2) if quick else (LENGTH, 400)
    texts = windows(
        tokenizer,
        None,
        tokens=64 * (128 if quick else 1024),
        length=128 if quick else 1024,
        seed=seed,
    )

    def tick(done: int, total: int) -> None:
        if done % 50 == 0:
            print(f"duo-attention seed {seed}: {done} of {total} steps", flush=True)

    found = calibrate(model, attlas.make("duo-attention", steps=steps), texts, tick=tick)
    fitted = found.tensors["gates"]
    if model.device.type == "cuda":
        model.to(torch.bfloat16)
    yield Row("gates below 0.1", 100 * float((fitted < 0.1).float().mean()), " %", "higher")
    yield Row("gates above 0.5", 100 * float((fitted > 0.5).float().mean()), " %", "higher")
    torch.manual_seed(seed)
    gates = {
        "fitted": fitted,
        "random": torch.rand_like(fitted),
        "inverted": 1 - fitted.clamp(0, 1),
    }
    sizes = {"sinks": 16, "recent": 32} if quick else {}
    parts: dict[str, CachePart | None] = {"full": None}
    for share in (0.5, 0.75):
        for name, each in gates.items():
            part = attlas.make("duo-attention", sparsity=share, pattern=each, **sizes)
            parts[f"{name}, {share:.0%} stream"] = part
    parts["all stream"] = attlas.make("duo-attention", sparsity=1.0, pattern=fitted, **sizes)
    for name, ratio in perplexities(model, tokenizer, parts, length, seed, 2 if quick else 32):
        yield Row(f"{name}: perplexity over the full cache's", ratio, "", "lower")
    for name, share in needles(model, tokenizer, parts, length, seed, 2 if quick else 100):
        yield Row(name, 100 * share, " %", "higher")


def needles(
    model: Any,
    tokenizer: Any,
    parts: dict[str, CachePart | None],
    length: int,
    seed: int,
    count: int,
) -> Iterator[tuple[str, float]]:
    """(part and when it is asked, share of numbers that are said rightly)."""
    single = [row for row in rows(tokenizer, length, seed) if row.task == "single"][:count]
    right: dict[str, int] = defaultdict(int)
    for number, batch in enumerate(batches(single, max(length, (1 << 17) // AT_ONCE))):
        ids = torch.tensor([row.context for row in batch], device=model.device)
        question = torch.tensor([row.question for row in batch], device=model.device)
        blind = prefill(model, ids, [part for part in parts.values() if part])
        asked = blind.extend(model, question)
        for name, part in parts.items():
            for when, read in (("blind", blind), ("asked", asked)):
                with torch.no_grad(), attach(model, *([part] if part else [])):
                    cache, logits = read.fork(part), read.logits
                    if when == "blind":
                        logits = model(question, **with_cache(model, cache)).logits[:, -1]
                    said = []
                    for _ in range(ANSWER):
                        said.append(logits.argmax(-1, keepdim=True))
                        logits = model(said[-1], **with_cache(model, cache)).logits[:, -1]
                answers = [tokenizer.decode(each) for each in torch.cat(said, 1).tolist()]
                right[f"{name}: {when}"] += sum(
                    _right(r.number, a) for r, a in zip(batch, answers, strict=True)
                )
        print(f"duo-attention seed {seed}: batch {number}, {dict(right)}", flush=True)
    yield from ((name, n / len(single)) for name, n in right.items())


def _right(number: str, answer: str) -> bool:
    return correct(_Number(number), answer)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Number:
    """What `correct` reads of a key."""

    number: str


@torch.no_grad()
def perplexities(
    model: Any,
    tokenizer: Any,
    parts: dict[str, CachePart | None],
    length: int,
    seed: int,
    count: int,
) -> Iterator[tuple[str, float]]:
    """(part, perplexity of what follows over the full cache's)."""
    texts = [continuation(tokenizer, length, PREDICTED, f"heads {seed} {i}") for i in range(count)]
    context, fed, targets = (
        torch.tensor([getattr(text, name) for text in texts], device=model.device)
        for name in ("context", "fed", "targets")
    )
    read, full = prefill(model, context, [part for part in parts.values() if part]), 0.0
    for name, part in parts.items():
        with attach(model, *([part] if part else [])):
            logits = model(fed, **with_cache(model, read.fork(part))).logits
        loss = float(cross_entropy(logits.flatten(0, 1).float(), targets.flatten()))
        full = loss if part is None else full
        yield name, math.exp(loss - full)


# Adaptive long-context heads

#: Keys of a chunk that has a Gaussian of its own.
CHUNKS = (256, 64)


class Watched(AdaptiveLongContext):
    """Notes every decision, and what others would have been; all heads look far meanwhile."""

    def choose(self, state: Any, body: Any, call: Any) -> None:
        """The share of near tokens by every estimate of the far mass [estimates, batch, heads]."""
        near = self.near_mass(call.cache_layer, body, call)
        keys, q = keys_of(body, self.sinks).float(), call.q[:, :, 0].float() * call.scaling
        true = scores_over(body, call.q, call.scaling)[..., self.sinks :].logsumexp(-1)
        far = [
            true,
            self.far_mass(state, call.q, call.scaling),
            *(mixed_mass(q, keys, n) for n in CHUNKS),
        ]
        self.found[call.layer].append((near - torch.stack(far)).sigmoid().cpu())

    def setup(self) -> None:
        super().setup()
        self.found: dict[int, list[Tensor]] = defaultdict(list)


def mixed_mass(q: Tensor, keys: Tensor, size: int) -> Tensor:
    """The mass on keys of which every `size` in a row are a Gaussian of their own."""
    masses = []
    for some in keys.split(size, dim=2):
        count = torch.full(some.shape[:2], some.shape[2], device=q.device)
        masses.append(gaussian_mass(q, count, some.sum(2), some.mT @ some))
    return torch.stack(masses).logsumexp(0)


@torch.no_grad()
def adaptive(cell: str, seed: int, quick: bool) -> Iterator[Row]:
    """Shares of (token, head) in which the decision is that of the exact masses; 34 texts a seed."""
    model, tokenizer, device = loaded(torch.float32)
    repeat, between, count, steps = (48, 160, 2, 2) if quick else (256, 1536, 34, 64)
    texts = []
    for i in range(count):
        rng = random.Random(f"adaptive {seed} {i}")
        again, filler = (
            tokenizer(passage(rng, 8 * n), add_special_tokens=False)["input_ids"][:n]
            for n in (repeat, between)
        )
        texts.append(again + filler + again)
    ids = torch.tensor(texts, device=device)
    start = ids.shape[1] - steps
    for recent in (128, 512):
        part = Watched(recent=16 if quick else recent)
        with attach(model, part):
            cache = cache_of(model(ids[:, :start], use_cache=True, logits_to_keep=1))
            for at in range(start, ids.shape[1]):
                model(ids[:, at : at + 1], **with_cache(model, cache))
        shares = torch.stack([torch.stack(part.found[i]) for i in sorted(part.found)])
        yield from judged(
            shares, part.threshold, f"{recent} recent"
        )  # [layers, steps, estimates, batch, heads]
        if recent == 128:
            for threshold in (0.3, 0.9):
                yield from judged(shares, threshold, f"{recent} recent, τ {threshold}")


def judged(shares: Tensor, threshold: float, told: str) -> Iterator[Row]:
    """Agreement by estimate and depth, and of what kind the mistakes are."""
    looks = shares < threshold
    true, names = looks[:, :, 0], ("one Gaussian", *(f"one every {n}" for n in CHUNKS))
    far = float(true.float().mean())
    yield Row(f"{told}: look far", 100 * far, " %", "lower")
    yield Row(f"{told}: always the same, agree", 100 * max(far, 1 - far), " %", "higher")
    for i, name in enumerate(names, 1):
        same = (looks[:, :, i] == true).float()
        yield Row(f"{told}: {name}, agree", 100 * float(same.mean()), " %", "higher")
        if i == 1:
            third = len(same) // 3
            for depth, some in (
                ("lower", same[:third]),
                ("middle", same[third : 2 * third]),
                ("upper", same[2 * third :]),
            ):
                yield Row(
                    f"{told}: {name}, agree in the {depth} third",
                    100 * float(some.mean()),
                    " %",
                    "higher",
                )
        missed = float((true & ~looks[:, :, i]).float().mean())
        yield Row(f"{told}: {name}, missed", 100 * missed, " %", "lower")
        lost = (1 - shares[:, :, 0])[true & ~looks[:, :, i]]
        yield Row(
            f"{told}: {name}, mass far away where it is missed",
            100 * float(lost.mean()) if len(lost) else 0.0,
            " %",
            "lower",
        )
        clear = (shares[:, :, 0] - threshold).abs() > 0.1
        yield Row(
            f"{told}: {name}, agree where it is clear by 0.1",
            100 * float(same[clear].mean()),
            " %",
            "higher",
        )


@dataclass(frozen=True)
class Claimed:
    """What is claimed, and how it is measured."""

    says: str
    set_up: str
    measure: Callable[[str, int, bool], Iterator[Row]]
    expects: tuple[Expectation, ...]
    cells: tuple[str, ...] = ("all",)
    derived: Callable[[list[Row]], list[Row]] = lambda rows: []

    def rows(self, cell: str, seed: int, quick: bool) -> Iterator[Row]:
        return self.measure(cell, seed, quick)


HEADS = {
    "duo-attention": Claimed(
        "with half of the heads streaming, passkeys are still found by the gates that were fitted, not "
        "by random ones",
        f"SmolLM2-135M, bfloat16, 100 needles a seed in {LENGTH} tokens, 64 sinks and 256 recent tokens; "
        "gates of 400 steps a seed",
        duo,
        (
            Beats("fitted, 50% stream: blind", "random, 50% stream: blind"),
            Beats("fitted, 50% stream: blind", "inverted, 50% stream: blind"),
        ),
    ),
    "adaptive-long-context-heads": Claimed(
        "what is near, and a Gaussian for what is far, tell in nine of ten cases whether a head looks "
        "far",
        "SmolLM2-135M, float32, 34 texts a seed of 2048 tokens whose first 256 come again at the end; "
        "64 tokens of these, 270 heads",
        adaptive,
        (Within("128 recent: one Gaussian, agree", least=90.0),),
    ),
}
