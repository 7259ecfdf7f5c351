"""What tuning through adapters is claimed to do: SinkLoRA, sentinel tokens, block attention.

    python benchmarks/claims_tuning.py [NAME ...] [--seeds 3] [--device cuda] [--out FOLDER]

SinkLoRA and sentinels: a small Llama reads bytes of Shakespeare, is trained on short windows and tuned on
longer ones, in every way from the same weights and on the same texts; nats a byte of held-out windows.
Block attention: SmolLM2-135M is asked what a passage says; % of answers whose first token is right. Its
tuning wants a GPU.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attlas
from attlas.attach import attach
from attlas.compare.machine import machine
from attlas.hf.models import LlamaConfig, LlamaForCausalLM
from attlas.kinds.expect import Beats, Expectation, NoWorse, Row, Within, verdict
from attlas.models.load import load_tokenizer
from attlas.study.record import packed, save
from attlas.tasks.text import shakespeare

SHORT, LONG, FIRST, TUNED, BATCH, HELD_OUT = 64, 256, 400, 150, 8, 0.1
CHUNK = 16
NAMES = ("Anna", "Bruno", "Carla", "Daniel", "Emma", "Felix", "Greta", "Hugo", "Irene", "Jonas", "Louis")
GOODS = ("apples", "books", "candles", "dogs", "eggs", "flowers", "gold", "horses", "iron", "maps",
         "nuts", "paper", "salt", "tea", "wine", "wood")  # fmt: skip
PLACES = ("Paris", "Rome", "Berlin", "London", "Madrid", "Vienna", "Prague", "Dublin", "Oslo", "Athens")


def windows(rows: int, length: int, seed: int, held_out: bool = False) -> Tensor:
    """Bytes of the plays, from their beginning or from their end."""
    text = torch.frombuffer(bytearray(shakespeare().encode()), dtype=torch.uint8).long()
    border = round((1 - HELD_OUT) * len(text))
    text = text[border:] if held_out else text[:border]
    at = torch.randint(len(text) - length, (rows,), generator=torch.Generator().manual_seed(seed))
    return text[at[:, None] + torch.arange(length)]


def fitted(weights: Any, steps: int, rate: float, loss: Callable[[int], Tensor]) -> None:
    """AdamW, its rate up over a tenth of the steps and down in a line."""
    weights = list(weights)
    adam, warm = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0), max(1, steps // 10)
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = rate * min((step + 1) / warm, (steps - step) / (steps - warm), 1.0)
        adam.zero_grad()
        loss(step).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()


def small(seed: int, device: str) -> Any:
    """A Llama of 4 layers that has learned short windows."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=96, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=2 * LONG,
    )).to(device).train()  # fmt: skip

    def loss(step: int) -> Tensor:
        ids = windows(4 * BATCH, SHORT, 1000 * seed + step).to(device)
        found: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return found

    fitted(model.parameters(), FIRST, 3e-3, loss)
    return model.eval()


def tuned(model: Any, name: str, seed: int, **options: Any) -> tuple[Any, Any]:
    """(adapter, model), tuned on long windows."""
    model, adapter = copy.deepcopy(model), attlas.make(name, **options)
    torch.manual_seed(seed)
    adapter.inject(model)
    model.train()

    def loss(step: int) -> Tensor:
        ids = windows(BATCH, LONG, 1000 * seed + 500 + step).to(model.device)
        found: Tensor = adapter.loss(model, ids, step / TUNED)
        return found

    fitted(adapter.trainable().values(), TUNED, 1e-3, loss)
    return adapter, model.eval()


def judged(adapter: Any, model: Any) -> float:
    """Nats of long windows that nothing was trained on."""
    with torch.no_grad():
        pieces = windows(64, LONG, 7, held_out=True).to(model.device).split(8)
        return sum(adapter.loss(model, ids, 0.0).item() for ids in pieces) / len(pieces)


def sinklora(seed: int, device: str) -> Iterator[Row]:
    model = small(seed, device)
    ways: dict[str, dict[str, Any]] = {
        "full": {"group": LONG}, "shifted sparse": {"sinks": 0, "returned": 0.0}, "sinklora": {},
    }  # fmt: skip
    whole = attlas.make("sinklora", group=LONG)
    with whole.inject(model):
        yield Row("untuned", judged(whole, model), " nats", "lower")
    for way, options in ways.items():
        yield Row(way, judged(*tuned(model, "sinklora", seed, **options)), " nats", "lower")


def sentinels(seed: int, device: str) -> Iterator[Row]:
    model = small(seed, device)
    without = tuned(model, "sentinel-summary-tokens", seed, chunk=LONG + 1)
    yield Row("without sentinels", judged(*without), " nats", "lower")
    adapter, model = tuned(model, "sentinel-summary-tokens", seed, chunk=CHUNK)
    yield Row("with sentinels", judged(adapter, model), " nats", "lower")
    spread = adapter.spread(windows(8, LONG, 8, held_out=True).to(device))
    with attach(model, record=["weights"]) as session, torch.no_grad():
        model(spread, use_cache=False)
        weights, at = session["weights"], (spread[0] == adapter.token).nonzero()[:, 0]
    ordinary = [q for q in range(LONG // 2, spread.shape[1]) if q not in at.tolist()]
    mass = weights[..., ordinary, :][..., at.to(weights.device)].sum(-1).mean().item()
    keys = sum(float((at < q).sum()) / q for q in ordinary) / len(ordinary)
    yield Row("mass on sentinels", 100 * mass, " %")
    yield Row("mass on sentinels over their share of keys", mass / keys, " x")


def question(rng: random.Random, tokenizer: Any) -> tuple[list[list[int]], list[int], int]:
    """(passages, question, first token of its answer)."""
    facts, told = {}, []
    for place in rng.sample(PLACES, 5):
        pairs = list(zip(rng.sample(NAMES, 3), rng.sample(GOODS, 3), strict=True))
        facts |= {(place, name): good for name, good in pairs}
        told.append(f"Market of {place}. " + " ".join(f"{n} sells {g}." for n, g in pairs) + "\n\n")
    place, name = rng.choice(list(facts))
    asked = f"Question: What does {name} sell in the market of {place}?\nAnswer: {name} sells"
    coded = [tokenizer(text)["input_ids"] for text in (*told, asked, f" {facts[place, name]}")]
    return coded[:-2], coded[-2], coded[-1][0]


def blocks(seed: int, device: str) -> Iterator[Row]:
    model, tokenizer = attlas.load("smollm2").to(device).float(), load_tokenizer("smollm2")
    adapter, rng = attlas.make("block-attention-rag"), random.Random(seed)
    adapter.inject(model)
    tests = [question(random.Random(f"test/{seed}/{n}"), tokenizer) for n in range(200)]

    def mode(passages: list[list[int]], apart: bool) -> Any:
        return adapter.passages([*map(len, passages)]) if apart else nullcontext()

    def right(apart: bool) -> float:
        count = 0
        for passages, asked, answer in tests:
            ids = torch.tensor([*chain(*passages), *asked], device=device)
            with torch.no_grad(), mode(passages, apart):
                count += int(model(ids, use_cache=False).logits[0, -1].argmax()) == answer
        return 100 * count / len(tests)

    def loss(step: int) -> Tensor:
        made = [question(rng, tokenizer) for _ in range(8)]
        total = torch.zeros((), device=device)
        for passages, asked, answer in made:
            ids = torch.tensor([*chain(*passages), *asked, answer], device=device)
            labels = ids.clone()
            labels[:, :-1] = -100
            for apart in (True, False):
                with mode(passages, apart):
                    total = total + model(ids, labels=labels, use_cache=False).loss
        return total / (2 * len(made))

    yield Row("full, untuned", right(False), " %")
    yield Row("block, untuned", right(True), " %")
    model.train()
    fitted(adapter.trainable().values(), 200, 3e-5, loss)
    model.eval()
    full, apart = right(False), right(True)
    yield Row("full, tuned", full, " %")
    yield Row("block, tuned", apart, " %")
    yield Row("block below full, tuned", full - apart, " points", "lower")


LLAMA = (
    f"Llama of 4 layers, width 96, {FIRST} steps on windows of {SHORT} bytes, {TUNED} on {LONG}; nats of "
    "64 held-out windows"
)
CLAIMS: dict[str, tuple[Any, str, str, tuple[Expectation, ...]]] = {
    "sinklora": (
        sinklora, "tuned on longer windows its loss lies between shifted sparse and full tuning", LLAMA,
        (Beats("sinklora", "shifted sparse"), Beats("full", "sinklora")),
    ),
    "sentinel-summary-tokens": (
        sentinels, "tuned with sentinels the loss is no higher than without, at equal steps, and "
        "attention reads them", f"{LLAMA}, chunks of {CHUNK}",
        (NoWorse("with sentinels", "without sentinels", 0.0), Within("mass on sentinels", least=1.0)),
    ),
    "block-attention-rag": (
        blocks, "tuned, block attention is within 3 points of full attention; untuned it is lower",
        "SmolLM2-135M, 200 steps of 8 questions about 5 passages in both modes; 200 questions asked",
        (Within("block below full, tuned", most=3.0), Beats("full, untuned", "block, untuned")),
    ),
}  # fmt: skip


def claimed(name: str) -> tuple[str, tuple[Expectation, ...]]:
    """What is claimed of a mechanism, and when it holds."""
    _, says, _, expects = CLAIMS[name]
    return says, expects


def main(claims: dict[str, Any] = CLAIMS, script: str = "claims_tuning") -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", choices=[*claims, []], default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "claims")
    given = parser.parse_args()
    for name in given.names or claims:
        run, says, set_up, expects = claims[name]
        rows: list[Row] = []
        for seed in range(given.seeds):
            for row in run(seed, given.device):
                rows.append(row)
                print(f"{name} seed {seed}: {row.name} {row.value:.4f}{row.unit}", flush=True)
        numbers = defaultdict(list)
        for row in rows:
            numbers[row.name].append(row.value)
        made = packed(
            name, says, set_up, f"python benchmarks/{script}.py {name} --seeds {given.seeds}",
            numbers, verdict([one.answer(rows) for one in expects]),
            {row.name: (row.unit, row.better) for row in rows},
            machine=machine(torch.device(given.device)),
        )  # fmt: skip
        save(made, given.out / f"{name}.json")
        print(f"{name}: {made['verdict']}", flush=True)


if __name__ == "__main__":
    main()
