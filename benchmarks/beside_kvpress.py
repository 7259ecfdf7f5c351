"""kvpress on the prompts of `cache_quality.py`: what it keeps, how long it takes, what it frees.

    python benchmarks/cache_quality.py --model smollm2 --export rows.json
    python benchmarks/beside_kvpress.py FOLDER_OF_THE_MODEL rows.json OUT.jsonl

For an environment with kvpress (which wants an older Transformers than attlas): attlas is not imported
here. The budgets are attlas's: compression_ratio = 1 − keep. Bytes are those of the storages that keys
and values keep alive, before and after: masking heads frees nothing.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import kvpress
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

PRESSES = {
    "snapkv": lambda keep: kvpress.SnapKVPress(compression_ratio=1 - keep),
    "tova": lambda keep: kvpress.TOVAPress(compression_ratio=1 - keep),
    "streaming-llm": lambda keep: kvpress.StreamingLLMPress(compression_ratio=1 - keep),
    "expected-attention": lambda keep: kvpress.ExpectedAttentionPress(compression_ratio=1 - keep),
    "ada-kv": lambda keep: kvpress.AdaKVPress(kvpress.SnapKVPress(compression_ratio=1 - keep)),
    "pyramid-kv": lambda keep: kvpress.PyramidKVPress(compression_ratio=1 - keep),
    "key-norm-eviction": lambda keep: kvpress.KnormPress(compression_ratio=1 - keep),
}
KEEP = (0.5, 0.25)
ROOM = 1 << 17
ANSWER_TOKENS = 16


def alive(cache: Any) -> int:
    """Bytes of the storages behind keys and values."""
    held = {}
    for layer in cache.layers:
        for x in (layer.keys, layer.values):
            held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(held.values())


def step(model: Any, ids: Tensor, cache: Any, at: int, logits: int = 1) -> Tensor:
    """Logits of tokens that stand at position `at` and behind."""
    positions = torch.arange(at, at + ids.shape[1], device=ids.device)[None].expand(len(ids), -1)
    return model(ids, past_key_values=cache, position_ids=positions, logits_to_keep=logits).logits


def answers(model: Any, tokenizer: Any, cache: Any, logits: Tensor, at: int) -> list[str]:
    said: list[list[int]] = [[] for _ in logits]
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    done = [False] * len(said)
    for _ in range(ANSWER_TOKENS):
        ids = logits.argmax(-1, keepdim=True)
        for row, token in enumerate(ids[:, 0].tolist()):
            done[row] = done[row] or token in ends
            if not done[row]:
                said[row].append(token)
                done[row] = re.search(r"\d\D", tokenizer.decode(said[row])) is not None
        if all(done):
            break
        logits, at = step(model, ids, cache, at)[:, -1], at + 1
    return [tokenizer.decode(each) for each in said]


def right(row: dict[str, Any], answer: str) -> bool:
    found = re.search(r"\d+", answer)
    return found is not None and found.group() == row["number"]


def synced() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def cell(model: Any, tokenizer: Any, make: Any, told: dict[str, Any]) -> dict[str, Any]:
    device, hits = model.device, defaultdict(list)
    alike: dict[int, list[Any]] = defaultdict(list)
    for row in told["rows"]:
        alike[len(row["question"])].append(row)
    seconds, rows, before, after = 0.0, 0, 0, 0
    for group in alike.values():
        most = max(1, ROOM // len(group[0]["context"]))
        for batch in (group[n : n + most] for n in range(0, len(group), most)):
            context = torch.tensor([r["context"] for r in batch], device=device)
            question = torch.tensor([r["question"] for r in batch], device=device)
            whole = torch.cat([context, question], dim=1)
            cache, press = DynamicCache(), make()
            with press(model):
                logits = step(model, whole, cache, 0)[:, -1]
                said = answers(model, tokenizer, cache, logits, whole.shape[1])
                hits["single"] += map(right, batch, said)
            cache, press = DynamicCache(), make()
            start = synced()
            with press(model):
                step(model, context, cache, 0)
            seconds, rows = seconds + synced() - start, rows + len(batch)
            after += alive(cache)
            logits = step(model, question, cache, context.shape[1])[:, -1]
            hits["blind"] += map(right, batch, answers(model, tokenizer, cache, logits, whole.shape[1]))
            full = DynamicCache()
            step(model, context, full, 0)
            before += alive(full)
    kl = []
    for text in told["texts"]:
        context, fed = (torch.tensor([text[n]], device=device) for n in ("context", "fed"))
        found = []
        for press in (None, make()):
            cache = DynamicCache()
            if press is None:
                step(model, context, cache, 0)
            else:
                with press(model):
                    step(model, context, cache, 0)
            found.append(step(model, fed, cache, context.shape[1], 0)[0].float().log_softmax(-1))
        p, q = found
        kl.append((p.exp() * (p - q)).sum(-1).clamp_min(0).mean().item())
    return {
        "numbers": {
            **{n: {"value": sum(each) / len(each), "n": len(each)} for n, each in hits.items()},
            "kl": {"value": sum(kl) / len(kl), "n": len(kl)},
            "held": {"value": after / before, "n": rows},
            "prefill_ms_a_row": {"value": 1e3 * seconds / rows, "n": rows},
        }
    }


def main() -> None:
    folder, told, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    if device == "cuda":
        for weight in model.parameters():
            weight.data = weight.data.bfloat16()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with out.open("a") as file:
        for length, prompts in told.items():
            for name, make in PRESSES.items():
                for keep in KEEP:
                    try:
                        found = cell(model, tokenizer, lambda m=make, k=keep: m(k), prompts)
                        line = {"status": "ok", **found}
                    except Exception as error:
                        line = {"status": f"{type(error).__name__}: {error}", "numbers": {}}
                    line |= {"model": Path(folder).name, "method": f"{name}(keep={keep})",
                             "length": int(length), "library": "kvpress"}  # fmt: skip
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    print(json.dumps(line)[:300], flush=True)


if __name__ == "__main__":
    main()
