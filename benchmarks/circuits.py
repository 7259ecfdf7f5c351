"""Circuits of SmolLM2: heads that indirect objects and colours share, and what its heads are worth.

    python benchmarks/circuits.py [--pairs 6] [--asked 40] [--seeds 3]

Path patching to the logits scores each head on `pairs` prompts of each task; the 5 % of heads with the
largest absolute scores are a task's circuit. The four shared heads with the largest scores are made to
look at the answer's token in `asked` other prompts, against four random heads of the same layers. Head
importance is taken on 8 passages of Shakespeare, the loss on 512 tokens of others, with the least
important 20 % of heads taken out, against five random choices of as many.
"""

from __future__ import annotations

import argparse
import random

import torch

import attlas
from attlas.adapting.texts import held_out
from attlas.analyses.circuit_reuse import forced, last, overlap, read
from attlas.analyses.head_importance import HeadImportance, least, loss
from attlas.attach import attach
from attlas.inspect.runs import by_layer, without
from attlas.inspect.subject import Subject
from attlas.inspect.tasks import draw
from attlas.models.load import load_tokenizer
from attlas.tasks.text import passage
from common import save, show

TASKS = ("indirect-objects", "colours")
SHARE = 0.05
REMOVED = 0.2
MOVERS = 4


def circuits(model, tokenizer, pairs: int, seed: int) -> dict[str, torch.Tensor]:
    """Path effects of all heads on the logits, by task."""
    look = attlas.make("path-patching").look
    drawn = {task: draw(task, tokenizer, pairs, seed) for task in TASKS}
    found = {task: look(Subject(model, prompts=prompts)) for task, prompts in drawn.items()}
    return {task: each.heads["path effect"].values for task, each in found.items()}


def largest(scores: torch.Tensor) -> list[tuple[int, int]]:
    """The heads of a circuit."""
    count = round(SHARE * scores.numel())
    return [divmod(at, scores.shape[1]) for at in scores.abs().flatten().topk(count).indices.tolist()]


def right(model, prompts, conditions: dict[str, list[tuple[int, int]]]) -> dict[str, int]:
    """How many prompts are answered right with the heads of each condition on the answer's token."""
    cache, step = read(model, prompts.clean[:, :-1]), prompts.clean[:, -1:]
    at = (prompts.clean == prompts.answers[:, :1]).to(torch.int).argmax(dim=1)
    weights = torch.nn.functional.one_hot(at, prompts.clean.shape[1]).float()
    hits = {}
    for name, heads in conditions.items():
        parts = [forced(weights, heads, model.config.num_hidden_layers)] if heads else []
        best = last(model, cache, step, *parts)[:, -1].argmax(dim=-1)
        hits[name] = int((best == prompts.answers[:, 0]).sum())
    return hits


def reuse(model, tokenizer, pairs: int, asked: int, seed: int) -> list[dict[str, object]]:
    """What both tasks share, and what looking at the answer does to the weaker one."""
    effects = circuits(model, tokenizer, pairs, seed)
    chosen = [largest(effects[task]) for task in TASKS]
    both = overlap(*chosen, effects[TASKS[0]].numel())
    summed = sum(effects.values())
    movers = sorted(both.shared, key=lambda head: -float(summed[head]))[:MOVERS]
    rng = random.Random(seed)
    others = [(layer, rng.randrange(model.config.num_attention_heads)) for layer, _ in movers]
    rows = [
        {
            "what": "overlap", "seed": seed, "heads": len(chosen[0]), "shared": len(both.shared),
            "bound": both.bound, "expected": both.expected, "chance": both.chance,
            "movers": [list(head) for head in movers], "random": [list(head) for head in others],
            "circuits": [[list(head) for head in each] for each in chosen],
        }
    ]  # fmt: skip
    for task in TASKS:
        prompts = draw(task, tokenizer, asked, 1000 + seed)
        conditions = {"none": [], "movers": movers, "random": others}
        for name, hits in right(model, prompts, conditions).items():
            rows.append(
                {"what": "accuracy", "seed": seed, "task": task, "forced": name, "hits": hits, "n": asked}
            )
    return [show(row) for row in rows]


def importance(model, tokenizer, seed: int) -> list[dict[str, object]]:
    """The loss without the least important heads, and without random ones."""
    texts = [passage(random.Random(100 * seed + k), 800) for k in range(8)]
    ids = torch.stack([torch.tensor(tokenizer(text).input_ids[:64]) for text in texts])
    tested = Subject(model, torch.cat(held_out(tokenizer, 512, 128)))
    rows = []
    counts = model.config.num_hidden_layers, model.config.num_attention_heads
    every = [(layer, head) for layer in range(counts[0]) for head in range(counts[1])]
    number = round(REMOVED * len(every))
    choices: dict[str, dict[int, list[int]]] = {"none": {}}
    scores = HeadImportance(normed="no").look(Subject(model, ids)).heads["importance"].values
    layered = scores / scores.norm(dim=1, keepdim=True)
    choices |= {"least, normed no": least(scores, number), "least, normed layer": least(layered, number)}
    for turn in range(5):
        choices[f"random {turn}"] = by_layer(random.Random(7 * seed + turn).sample(every, number))
    for name, heads in choices.items():
        with torch.no_grad(), attach(model, *without(heads), compile=False):
            value = float(loss(tested))
        row = {"what": "importance", "seed": seed, "removed": name, "heads": number, "loss": value}
        rows.append(show(row))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--asked", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    model, tokenizer = attlas.load("smollm2"), load_tokenizer("smollm2")
    rows: list[dict[str, object]] = []
    for seed in range(given.seeds):
        rows += reuse(model, tokenizer, given.pairs, given.asked, seed)
        save("circuits", "cpu", rows)
        rows += importance(model, tokenizer, seed)
        save("circuits", "cpu", rows)


if __name__ == "__main__":
    main()
