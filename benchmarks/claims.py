"""Papers' claims that a small model can show, tried: benchmarks/claims/*.json and docs/claims.md.

    python benchmarks/claims.py [SLUG ...] [--jobs 4] [--device cpu]      run, all claims unless named
    python benchmarks/claims.py --page                                    write the page again

A claim is tried by `attlas train` with several seeds. It *holds* if the mechanism beats every model it is
held against by more than two standard errors of the difference, *partly* if it beats the first by less or
not all, and *does not hold here* otherwise. A claim of "no worse" names the margin that it allows.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from claims_linear import MEASURED as LINEAR
from claims_page import page
from claims_record import Numbers, record, variance

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "claims"
PAGE = HERE.parent / "docs" / "claims.md"

@dataclass(frozen=True)
class Claim:
    """What a paper says, and how it is tried by training.

    Args:
        slug: the mechanism; also the name of the result's file, with `also` behind it.
        says: the paper's claim, in our words.
        ours: the mechanism as `attlas train` takes it.
        against: what it is held against.
        task: as `attlas train` takes it.
        split: the test that counts; the task's first unless given.
        better: "higher" or "lower".
        margin: how much worse than the first rival is still "no worse", as a share; None asks for better.
        options: further options of `attlas train`.
        also: distinguishes several claims of one mechanism.
    """

    slug: str
    says: str
    ours: str
    task: str
    against: tuple[str, ...] = ("softmax",)
    split: str = ""
    better: str = "higher"
    margin: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    also: str = ""

    @property
    def name(self) -> str:
        return f"{self.slug}-{self.also}" if self.also else self.slug

    def command(self, out: str) -> list[str]:
        """The training."""
        given = {"steps": 1000, "batch": 32, "seeds": 3, "dim": 64, "layers": 2, "heads": 4,
                 **self.options}  # fmt: skip
        mechanisms = ",".join((*self.against, self.ours))
        words = ["attlas", "train", "--task", self.task, "--mechanisms", mechanisms]
        for option, value in given.items():
            words += [f"--{option}", str(value)]
        return [*words, "--out", out]

    def numbers(self, folder: Path) -> Numbers:
        """Each mechanism's scores by seed, from the training's results."""
        found: Numbers = {}
        for text in (folder / "results.jsonl").read_text().splitlines():
            line = json.loads(text)
            if line["status"] != "ok":
                raise RuntimeError(f"{line['mechanism']}, seed {line['seed']}: {line['reason']}")
            scores = line["scores"]
            split = self.split or next(iter(scores))
            found.setdefault(line["mechanism"], []).append(scores[split])
        return found


def claims() -> list[Claim]:
    """The claims of claims.toml."""
    listed = tomllib.loads((HERE / "claims.toml").read_text("utf-8"))["claim"]
    return [Claim(**{**c, "against": tuple(c.get("against", ["softmax"]))}) for c in listed]


# Claims that are measured, not trained ---------------------------------------------------------------


def dint_rows() -> dict[str, Any]:
    import torch

    import attlas

    off = {"differential-transformer": [], "dint-transformer": []}
    for seed in range(3):
        for name, each in off.items():
            torch.manual_seed(seed)
            layer = attlas.make(name, dim=64, heads=4, causal=True, depth=6).double()
            weights = layer.weights(torch.randn(2, 64, 64, dtype=torch.float64))
            each.append(float((weights.sum(-1) - 1).abs().max().detach()))
    return record(
        "dint-transformer", "the rows of its map sum to one, those of the differential map do not",
        "largest |row sum − 1| of random layers, 64 tokens, depth 6", "one call of `weights`", off,
        "holds" if max(off["dint-transformer"]) < 1e-6 else "does not hold here", "lower",
    )  # fmt: skip


def qk_norm_logits() -> dict[str, Any]:
    """The same small decoder trained at a high rate; the largest score before the softmax."""
    import torch

    from attlas.models.decoder import Decoder, DecoderConfig
    from attlas.tasks.train import find

    def largest(name: str, seed: int) -> float:
        torch.manual_seed(seed)
        task = find("recall")()
        config = DecoderConfig(vocab_size=task.sizes.outputs, hidden_size=64, num_hidden_layers=2,
                               num_attention_heads=4, attention=name)  # fmt: skip
        model, rng = Decoder(config), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(400):
            batch = task.draw(rng, 64)
            loss = task.loss(model(batch["input_ids"]).logits, batch) / task.terms(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seen: list[float] = []
        for block in model.model.layers:
            layer = block.attention
            score = layer.score

            def spy(q: Any, k: Any, score: Any = score) -> Any:
                scores = score(q, k)
                seen.append(float(scores.abs().max().detach()))
                return scores

            layer.score = spy
            layer.attend = lambda q, k, v, mask, inputs, layer=layer: layer.aggregate(
                layer.weigh(q, k, mask, inputs), v
            )
        with torch.no_grad():
            model(batch["input_ids"])
        return max(seen)

    numbers = {n: [largest(n, s) for s in range(3)] for n in ("softmax", "qk-norm")}
    return record(
        "qk-norm", "cosines bound the scores, so that training at high rates does not blow them up",
        "largest |score| before the softmax, 400 steps of `recall` at a rate of 1e-2, 2 layers, dim 64",
        "benchmarks/claims.py qk-norm", numbers, verdict(numbers, "qk-norm", ("softmax",), "lower", None),
        "lower",
    )  # fmt: skip


def sqa_cost() -> dict[str, Any]:
    speed = json.loads((HERE / "results" / "mechanisms-cuda.json").read_text())
    rows = {(r["name"], r["what"], r["length"]): r for r in speed["results"]}
    row = rows["sparse-query-attention", "forward", 32768]
    share = row["ours_ms"] / row["theirs_ms"]
    made = record(
        "sparse-query-attention",
        "a quarter of the query heads makes long inputs up to three times as fast",
        "forward, 32768 tokens, 4 of 16 heads of 128, bfloat16, beside the fastest SDPA layer",
        speed["command"], {"softmax": [row["theirs_ms"]], "sparse-query-attention": [row["ours_ms"]]},
        "holds" if share <= 1 / 3 else "partly" if share < 1 else "does not hold here", "lower", "ms",
    )  # fmt: skip
    return {**made, "machine": speed["machine"], "versions": speed["versions"]}


MEASURED: dict[str, Callable[[], dict[str, Any]]] = {
    "dint-transformer": dint_rows, "qk-norm": qk_norm_logits, "sparse-query-attention": sqa_cost,
    **LINEAR,
}  # fmt: skip


# Verdicts and records --------------------------------------------------------------------------------


def verdict(
    numbers: Numbers, ours: str, against: tuple[str, ...], better: str, margin: float | None
) -> str:
    """The rule of this page; see its head."""
    sign = 1.0 if better == "higher" else -1.0
    mine = numbers[ours]
    if not all(map(math.isfinite, mine)):
        return "does not hold here"
    if margin is not None:
        rival = statistics.mean(numbers[against[0]])
        gap = sign * (statistics.mean(mine) - rival) + margin * abs(rival)
        return "holds" if gap >= 0 else "does not hold here"
    clear = []
    for other in against:
        theirs = [x for x in numbers[other] if math.isfinite(x)]
        gap = sign * (statistics.mean(mine) - statistics.mean(theirs)) if theirs else math.inf
        error = math.sqrt(sum(variance(x) / len(x) for x in (mine, theirs) if x))
        clear.append("yes" if gap > 2 * error and gap > 0 else "some" if gap > 0 else "no")
    if all(c == "yes" for c in clear):
        return "holds"
    return "partly" if clear[0] != "no" else "does not hold here"


def tried(claim: Claim, device: str, work: Path | None) -> dict[str, Any]:
    """Train, read the results, judge; in a folder that stays, a training that was cut off goes on."""
    from attlas.train.plan import parse_mechanisms

    with tempfile.TemporaryDirectory() as temporary:
        folder = str(work / claim.name) if work else temporary
        command = [*claim.command(folder), "--device", device]
        said = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
        if said.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{said.stdout[-2000:]}{said.stderr[-2000:]}")
        numbers = claim.numbers(Path(folder))
    ours, *against = (m.label for m in parse_mechanisms([claim.ours, *claim.against]))
    judged = verdict(numbers, ours, tuple(against), claim.better, claim.margin)
    shown = " ".join(f"'{w}'" if "(" in w else w for w in claim.command("OUT"))
    set_up = f"`{claim.task}`" + (f", {claim.split}" if claim.split else "")
    if claim.margin is not None:
        set_up += f"; no worse than by {claim.margin:.0%}"
    made = record(claim.slug, claim.says, set_up, shown, numbers, judged, claim.better)
    return {**made, "ours": ours, "against": against}


def save(name: str, made: dict[str, Any]) -> None:
    FOLDER.mkdir(exist_ok=True)
    packed = json.dumps(made, indent=1, ensure_ascii=False, allow_nan=False)
    (FOLDER / f"{name}.json").write_text(packed + "\n")
    means = {n["of"]: round(n["mean"], 4) for n in made["numbers"]}
    print(f"{name}: {made['verdict']}", means, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", help="claims to try; all unless given")
    parser.add_argument("--jobs", type=int, default=1, help="claims at a time, a thread each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, help="folder for trainings, to go on from")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parser.parse_args()
    if not options.page:
        wanted = set(options.names)
        chosen = [c for c in claims() if not wanted or {c.slug, c.name} & wanted]
        measured = [name for name in MEASURED if not wanted or name in wanted]
        failed = []
        with ThreadPoolExecutor(options.jobs) as pool:
            runs = {pool.submit(tried, c, options.device, options.work): c.name for c in chosen}
            runs |= {pool.submit(MEASURED[name]): name for name in measured}
            for run in as_completed(runs):
                name = runs[run]
                try:
                    save(name, run.result())
                except Exception as error:  # one claim's failure is its own
                    failed.append(name)
                    print(f"{name} could not be tried: {error}", flush=True)
        if failed:
            print(f"not tried: {failed}")
    PAGE.write_text(page(FOLDER))


if __name__ == "__main__":
    main()
