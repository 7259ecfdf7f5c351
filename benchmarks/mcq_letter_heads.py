"""Right-letter heads of small decoders trained on multiple choice, and the directions they need.

    python benchmarks/mcq_letter_heads.py [--seeds 0 1 2] [--steps 1500]

    Q word ⏎ letter word ⏎ letter word ⏎ letter word ⏎ letter word ⏎ answer:      → the word's letter

In half of the training prompts the letters are A, B, C, D in their order, in the others four of 26 that
are drawn. Output heads are taken in the order of their effect at the last token until they restore more
than 90 % of the answer; right-letter heads are those whose last query gives the right option most
of its weight. Their q and k are projected on few directions, found on ordered prompts.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional as F

import attlas
from attlas.analyses.mcq_correct_letter_heads import HeadSubspaces, spaces
from attlas.attach import attach
from attlas.inspect.attribution import attribution
from attlas.inspect.prompts import Prompts
from attlas.inspect.runs import by_layer, logits_with, patched_heads, patched_together, without
from common import save, show

LETTERS, WORDS, OPTIONS = 26, 40, 4
QUESTION, LINE, ANSWER = LETTERS + WORDS, LETTERS + WORDS + 1, LETTERS + WORDS + 2
#: Where the first option begins, and tokens of an option: its letter, its word, its line's end.
FIRST, WIDTH = 3, 3


def drawn(count: int, generator: torch.Generator, ordered: bool) -> tuple[torch.Tensor, ...]:
    """(prompts, prompts that ask for another option, the two answers, which options they are)."""
    rows = torch.rand(count, WORDS, generator=generator).argsort(dim=1)[:, :OPTIONS] + LETTERS
    letters = torch.arange(OPTIONS).expand(count, -1)
    if not ordered:
        letters = torch.rand(count, LETTERS, generator=generator).argsort(dim=1)[:, :OPTIONS]
    which = torch.rand(count, OPTIONS, generator=generator).argsort(dim=1)[:, :2]
    line = torch.full((count, OPTIONS), LINE)
    options = torch.stack([letters, rows, line], dim=2).flatten(1)
    ends = [torch.full((count, 1), token) for token in (QUESTION, LINE, ANSWER)]
    asked = [torch.cat([ends[0], rows.gather(1, which[:, n : n + 1]), ends[1], options, ends[2]], dim=1)
             for n in (0, 1)]  # fmt: skip
    return *asked, letters.gather(1, which), which


def trained(seed: int, steps: int) -> attlas.Decoder:
    """A decoder of three layers of four heads."""
    torch.manual_seed(seed)
    model = attlas.Decoder(
        attlas.DecoderConfig(
            vocab_size=ANSWER + 1, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=4,
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        halves = [drawn(64, generator, ordered) for ordered in (True, False)]
        ids = torch.cat([half[0] for half in halves])
        right = torch.cat([half[2][:, 0] for half in halves])
        loss = F.cross_entropy(model(input_ids=ids).logits[:, -1], right)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def right_share(model, ids, answers, *parts) -> float:
    """Share of prompts whose right letter has the highest logit of all tokens."""
    return float((logits_with(model, ids, *parts)[:, -1].argmax(-1) == answers).double().mean())


def looked_into(seed: int, steps: int) -> dict[str, object]:
    """Everything about one model."""
    model = trained(seed, steps)
    generator = torch.Generator().manual_seed(1000 + seed)
    found, held = drawn(256, generator, True), drawn(1000, generator, True)
    mixed = drawn(1000, generator, False)
    row: dict[str, object] = {"seed": seed}
    for name, x in (("ordered", held), ("drawn", mixed)):
        row[name] = right_share(model, x[0], x[2][:, 0])

    of = F.one_hot(held[2][:, 0], ANSWER + 1).double()
    of[:, :OPTIONS] -= 1 / OPTIONS
    parts = attribution(model.double(), held[0], of)
    row["sum off by"] = float((parts.total - parts.logit).abs().max())
    model.float()

    prompts = Prompts(*(x for x in found[:3]))
    effects = patched_heads(model, prompts, (-1,))
    order = [divmod(int(at), effects.shape[1]) for at in effects.flatten().argsort(descending=True)]
    output = next(order[:n] for n in range(1, len(order) + 1)
                  if patched_together(model, prompts, order[:n], (-1,)) > 0.9)  # fmt: skip
    fresh = Prompts(*(x for x in held[:3]))
    row |= {"output heads": output, "restored": patched_together(model, fresh, output, (-1,))}

    with torch.no_grad(), attach(model, record=["weights"]) as session:
        model(input_ids=found[0])
        last = session["weights"][..., -1, FIRST:-1].unflatten(-1, (OPTIONS, WIDTH))
    rows = torch.arange(len(found[0]))
    on_right = last[:, rows, :, found[3][:, 0]].mean(0)  # layers, heads, tokens of an option
    letter = [(x, h) for x, h in output if on_right[x, h].sum() > 0.5]
    row |= {"letter heads": letter, "their weight": [float(on_right[x, h].sum()) for x, h in letter]}
    for directions in (1, 2, 3, 4, 8):
        patches = []
        for x, h in letter:
            place = int(on_right[x, h].argmax())
            places = tuple(FIRST + WIDTH * n + place for n in range(OPTIONS))
            each = spaces(model, found[0], [(x, h)], {"q": (-1,), "k": places}, directions)
            patches.append(HeadSubspaces(**each, k_tokens=places))
        for name, x in (("ordered", held), ("drawn", mixed)):
            row[f"{name}, {directions} directions"] = right_share(model, x[0], x[2][:, 0], *patches)
    ablated = without(by_layer(letter))
    row["without them"] = right_share(model, held[0], held[2][:, 0], *ablated)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500)
    given = parser.parse_args()
    save("mcq-letter-heads", "cpu", [show(looked_into(seed, given.steps)) for seed in given.seeds])


if __name__ == "__main__":
    main()
