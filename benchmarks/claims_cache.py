"""Claims of caches, on the real language model: NAME.json of those that are named, or of all.

    python benchmarks/claims_cache.py [--out FOLDER] [--device cuda] [--length 2048] [NAME ...]

Each seed reads `--texts` texts for perplexities, relative to the full cache's, and as many with a number
hidden in them, all in one batch. The records go beside the others with `--out benchmarks/claims`.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import attlas
from attlas import prefill
from attlas.attach import Part, attach
from attlas.cache.part import CachePart
from attlas.hf.caches import with_cache
from attlas.kinds.expect import Beats, Expectation, Row, Within, verdict
from attlas.models.load import load_tokenizer
from attlas.parts.quantize.zipcache import ZipCache
from attlas.study.record import packed, save
from attlas.tasks.continuation import continuation
from attlas.tasks.haystack import correct, single

#: Tokens that are predicted of a text, and that an answer may have.
PREDICTED, ANSWER = 32, 8
Parts = Mapping[str, CachePart | None]


class Accumulated(ZipCache):
    """ZipCache that ranks by the sum of attention, however many queries could see a token."""

    def worth(self, layer: Any, state: Any, rows: Any) -> Tensor:
        """The score without its division."""
        seen = rows.totals(layer.keys.shape[0], layer.keys.device)[:, None, None]
        return super().worth(layer, state, rows) * (seen - rows.at(layer.dense_positions())[1])


@dataclass
class Bench:
    """A model, and how much of what it is asked."""

    model: Any
    tokenizer: Any
    texts: int
    length: int
    seeds: int
    device: str

    def perplexities(self, parts: Parts, seed: int, step: int) -> Iterator[tuple[str, float, float]]:
        """(name, perplexity over the full cache's, bits held of each number) of every part.

        Args:
            parts: by name; None is the full cache, which must be among them and first.
            seed: of the texts.
            step: how many of the tokens that follow are read at a time.
        """
        made = [
            continuation(self.tokenizer, self.length, PREDICTED, f"claims {seed} {i}")
            for i in range(self.texts)
        ]
        context, fed, targets = (
            torch.tensor([getattr(text, name) for text in made], device=self.device)
            for name in ("context", "fed", "targets")
        )
        read, full = prefill(self.model, context, [p for p in parts.values() if p]), (0.0, 0.0)
        for name, part in parts.items():
            with torch.no_grad(), attach(self.model, *([part] if part else [])):
                cache, loss = read.fork(part), 0.0
                held = float(sum(_bytes(layer) for layer in cache.layers))
                for at in range(0, PREDICTED, step):
                    out = self.model(fed[:, at : at + step], **with_cache(self.model, cache))
                    wanted = targets[:, at : at + step].flatten()
                    logits = out.logits.float().flatten(0, 1)
                    loss += float(cross_entropy(logits, wanted, reduction="sum"))
            loss /= targets.numel()
            full = (loss, held) if part is None else full
            yield name, math.exp(loss - full[0]), 8 * self.model.dtype.itemsize * held / full[1]

    def needles(self, parts: Parts, seed: int) -> Iterator[tuple[str, float]]:
        """(name, share of the hidden numbers that are said rightly, asked for in the prompt)."""
        asked = defaultdict(list)
        for i in range(self.texts):
            text = single(self.tokenizer, self.length, (i + 0.5) / self.texts, f"claims {seed} {i}")
            ids = text.context + text.asked[0].question
            asked[len(ids)].append((ids, text.asked[0]))  # rows of one length need no padding
        right = dict.fromkeys(parts, 0)
        for found in asked.values():
            ids = torch.tensor([ids for ids, _ in found], device=self.device)
            read = prefill(self.model, ids, [p for p in parts.values() if p])
            for name, part in parts.items():
                said = self._said(read, part)
                right[name] += sum(correct(key, s) for (_, key), s in zip(found, said, strict=True))
        yield from ((name, count / self.texts) for name, count in right.items())

    @torch.no_grad()
    def _said(self, read: Any, part: CachePart | None) -> list[str]:
        cache, logits, said = read.fork(part), read.logits, []
        with attach(self.model, *([part] if part else [])):
            for _ in range(ANSWER):
                said.append(logits.argmax(-1, keepdim=True))
                logits = self.model(said[-1], **with_cache(self.model, cache)).logits[:, -1]
        return [self.tokenizer.decode(row) for row in torch.cat(said, 1).tolist()]


def _bytes(layer: Any) -> int:
    """What a layer holds now, room for tokens to come left out."""
    bodies = getattr(layer, "bodies", {}).values()
    tensors = [layer.keys, layer.values, *(t for body in bodies for t in body.tensors.values())]
    return sum(t.nbytes for t in tensors if t is not None)


def recycled(bench: Bench) -> Iterator[Row]:
    """The list against a window with sinks and the accumulated attention of as many tokens."""
    for share in (0.25, 0.125):
        recent = int(bench.length * share) // 2
        make = attlas.make
        parts: dict[str, CachePart | None] = {
            "full": None,
            "window": make("streaming-llm", keep=share, while_decoding=True),
            "accumulated": make(
                "observed-attention", keep=share, divide=False, recent=recent, while_decoding=True
            ),
            "recycled": make("recycled-attention", keep=share),
            "every 10": make("recycled-attention", keep=share, stride=10),
            "similarity": make("recycled-attention", keep=share, stride=50, similarity=0.8),
        }
        for seed in range(bench.seeds):
            for name, ratio, _ in bench.perplexities(parts, seed, 1):
                yield Row(f"{name}, perplexity at {share:g}", ratio, "", "lower")
            for name, found in bench.needles(parts, seed):
                yield Row(f"{name}, needles at {share:g}", 100 * found, "%", "higher")


def qaq(bench: Bench) -> Iterator[Row]:
    """Bits by the error allowed, against uniform ones; the norm of queries is a model's own."""
    norm, make = _query_norm(bench), attlas.make
    parts: dict[str, CachePart | None] = {"full": None, "defaults": make("qaq")}
    parts |= {
        f"errors {e:g}": make("qaq", key_error=e, value_error=e / 3, q_norm=norm)
        for e in (3.0, 0.3, 0.03, 0.01)
    }
    parts |= {f"uniform {bits}": make("quantized-cache", bits=bits) for bits in (2, 3, 4)}
    yield Row("norm of a query", norm, "", "lower")
    yield from _bits(bench, parts)


def zipcache(bench: Bench) -> Iterator[Row]:
    """Four and two bits, by the normalised score and by the sum."""
    parts: dict[str, CachePart | None] = {"full": None}
    for ratio in (0.4, 0.2, 0.1):
        parts |= {f"normalised, {ratio:g} in two bits": ZipCache(ratio=ratio)}
        parts |= {f"accumulated, {ratio:g} in two bits": Accumulated(ratio=ratio)}
    parts |= {"all in four bits": ZipCache(other_bits=4)}
    yield from _bits(bench, parts)


def _bits(bench: Bench, parts: Parts) -> Iterator[Row]:
    for seed in range(bench.seeds):
        for name, ratio, bits in bench.perplexities(parts, seed, PREDICTED):
            yield Row(f"{name}, perplexity", ratio, "", "lower")
            yield Row(f"{name}, bits", bits, "", "lower")


def _query_norm(bench: Bench) -> float:
    """Mean norm of the queries as they meet the keys, over a text."""
    text = continuation(bench.tokenizer, 512, 1, "norms")
    found: list[Tensor] = []

    class Norms(Part):
        def observe(self, call: Any) -> None:
            found.append(call.q.float().norm(dim=-1).mean())

    with torch.no_grad(), attach(bench.model, Norms()):
        bench.model(torch.tensor([text.context], device=bench.device))
    return float(torch.stack(found).mean())


Claim = tuple[str, Callable[[Bench], Iterator[Row]], tuple[Expectation, ...]]
CLAIMS: dict[str, Claim] = {
    "recycled-attention": (
        "its perplexity and retrieval beat a window and accumulated attention of the same budget",
        recycled,
        tuple(
            Beats(f"recycled, {what} at {share:g}", f"{other}, {what} at {share:g}")
            for what in ("perplexity", "needles")
            for share in (0.25, 0.125)
            for other in ("window", "accumulated")
        ),
    ),
    "qaq-quality-adaptive-quantization": (
        "bits below four on average cost under 2 % of perplexity, and less than as many uniform ones",
        qaq,
        (
            Within("defaults, perplexity", most=1.02),
            Within("defaults, bits", most=4.0),
            Beats("defaults, perplexity", "uniform 3, perplexity"),
        ),
    ),
    "zipcache": (
        "four and two bits keep perplexity within 2 %, and beat selection by accumulated attention",
        zipcache,
        (
            Within("normalised, 0.4 in two bits, perplexity", most=1.02),
            Beats("normalised, 0.4 in two bits, perplexity",
                  "accumulated, 0.4 in two bits, perplexity"),
        ),
    ),
}  # fmt: skip


def claimed(name: str) -> tuple[str, tuple[Expectation, ...]]:
    """What is claimed of a mechanism, and when it holds."""
    claim, _, expects = CLAIMS[name]
    return claim, expects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CLAIMS)}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "claims")
    parser.add_argument("--device", default="cpu")
    for name, value in (("texts", 34), ("length", 2048), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in CLAIMS]:
        parser.error(f"no claim is called {unknown[0]!r}; there are {', '.join(CLAIMS)}")
    model = attlas.load("smollm2").to(given.device, torch.bfloat16)
    tokenizer = load_tokenizer("smollm2")
    bench = Bench(model, tokenizer, given.texts, given.length, given.seeds, given.device)
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.names or CLAIMS:
        claim, expects = claimed(name)
        rows_of = CLAIMS[name][1]
        rows, numbers = list(rows_of(bench)), defaultdict(list)
        for row in rows:
            numbers[row.name].append(row.value)
        set_up = (
            f"SmolLM2-135M, {given.texts} texts of {given.length} tokens a seed, {PREDICTED} predicted "
            "of each, bfloat16; perplexity over the full cache's"
        )
        command = f"python benchmarks/claims_cache.py --length {given.length} {name}"
        made = packed(
            name, claim, set_up, command, numbers, verdict([one.answer(rows) for one in expects]),
            {row.name: (row.unit, row.better) for row in rows}, machine=given.device,
        )  # fmt: skip
        save(made, given.out / f"{name}.json")
        print(f"{name}: {made['verdict']}", flush=True)
        for label, values in numbers.items():
            print(f"  {label}: {sum(values) / len(values):.4g}", flush=True)


if __name__ == "__main__":
    main()
