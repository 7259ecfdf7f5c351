"""`head-roles` beside TransformerLens and BertViz on the same text and model: time, memory, page.

    PYTHONPATH=FOLDER python benchmarks/beside_lens.py [--lengths 512 2048 8192]

FOLDER is where `pip install --target FOLDER transformer-lens bertviz` put them; what is not installed is
skipped. Each is measured in a process of its own, one after the other, with SmolLM2's weights on a CPU:

    attlas            `head-roles` of a forward pass
    transformer-lens  `run_with_cache` of all patterns, and the same nine statistics of them
    bertviz           a forward pass with all maps, and the page of `model_view`

A process that may take `--room` GiB at most and gives up tells why. Seconds are of the clock, rough on a
shared machine, and of the processor, which count threads that wait for each other: there `--threads 1`.
Peaks are those of the process, the model included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from importlib.util import find_spec
from typing import Any

from common import save, show

NEEDS = {"attlas": "attlas", "transformer-lens": "transformer_lens", "bertviz": "bertviz"}


def text(length: int) -> Any:
    """Token ids; some come often and most seldom, as in a text."""
    import torch

    torch.manual_seed(0)
    return (torch.rand(1, length) ** 4 * 20000).long()


def with_attlas() -> Any:
    import torch

    import attlas
    from attlas.attach import attach

    model = attlas.load("smollm2").eval()

    def run(ids: Any) -> int:
        with torch.no_grad(), attach(model, record=["head-roles"]) as session:
            model(ids, use_cache=False, logits_to_keep=1)
            session["head-roles"]
        return 0

    return run


def with_lens() -> Any:
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    import attlas
    from attlas.models.load import load_tokenizer

    name = "HuggingFaceTB/SmolLM2-135M"
    model = TransformerBridge.boot_transformers(
        name, hf_model=attlas.load("smollm2").eval(), tokenizer=load_tokenizer("smollm2"), device="cpu"
    )

    def run(ids: Any) -> int:
        with torch.no_grad():
            _, cache = model.run_with_cache(
                ids, names_filter=lambda name: name.endswith("hook_pattern")
            )
            for layer in range(model.cfg.n_layers):
                statistics(cache[f"blocks.{layer}.attn.hook_pattern"], ids)
        return 0

    return run


def statistics(pattern: Any, ids: Any) -> dict[str, Any]:
    """The nine, of all weights [batch, heads, queries, keys]."""
    import torch

    n = ids.shape[1]
    i, j = torch.arange(n)[:, None], torch.arange(n)
    none = ids.new_full((1, 1), -1)
    before, coming = torch.cat([none, ids[:, :-1]], 1), torch.cat([ids[:, 1:], none], 1)
    like = {
        "duplicate": (ids[:, :, None] == ids[:, None]) & (j < i),
        "induction": (ids[:, :, None] == before[:, None]) & (j <= i),
        "copying": (coming[:, :, None] == ids[:, None]) & (j <= i),
    }
    return {
        "entropy": torch.special.entr(pattern).sum(-1).mean(-1),
        "sink": pattern[..., 0].mean(-1),
        "self": pattern.diagonal(dim1=-2, dim2=-1).mean(-1),
        "previous": pattern.diagonal(-1, -2, -1).sum(-1) / n,
        "distance": (pattern * (i - j).abs()).sum(-1).mean(-1),
        "peak": pattern.amax(-1).mean(-1),
        **{name: (pattern * pairs[:, None]).sum(-1).mean(-1) for name, pairs in like.items()},
    }


def with_bertviz() -> Any:
    import torch
    from bertviz import model_view

    import attlas
    from attlas.models.load import load_tokenizer

    model, tokenizer = attlas.load("smollm2").eval(), load_tokenizer("smollm2")
    model.set_attn_implementation("eager")

    def run(ids: Any) -> int:
        tokens = tokenizer.convert_ids_to_tokens(ids[0].tolist())
        with torch.no_grad():
            found = model(ids, output_attentions=True, use_cache=False, logits_to_keep=1).attentions
        page = model_view(found, tokens, html_action="return")
        return len(page.data.encode())

    return run


TOOLS = {"attlas": with_attlas, "transformer-lens": with_lens, "bertviz": with_bertviz}


def measure(tool: str, length: int) -> None:
    """Print what one run takes; the model is loaded before, and a short text read."""
    run, ids = TOOLS[tool](), text(length)
    run(text(16))
    began, busy = time.perf_counter(), time.process_time()
    page = run(ids)
    told = {"seconds": time.perf_counter() - began, "processor_s": time.process_time() - busy}
    told["page_mib"] = page / 2**20
    told["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps(told))


def asked(tool: str, length: int, room: int, limit: int, threads: str) -> dict[str, object]:
    """What a process of its own tells of a tool, or why it gave up."""
    command = [sys.executable, __file__, "--measure", tool, str(length)]

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (room << 30, room << 30))

    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=limit, preexec_fn=bounded,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"gave_up": f"not done after {limit} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"gave_up": lines[-1][:200] if lines else f"ended by signal {-done.returncode}"}
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--room", type=int, default=16, help="GiB that a process may take")
    parser.add_argument("--limit", type=int, default=900, help="seconds that it may take")
    parser.add_argument("--threads", default=str(os.cpu_count()))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure[0], int(given.measure[1]))
        return
    rows = []
    for length in given.lengths:
        for tool, package in NEEDS.items():
            if find_spec(package) is None:
                print(f"{tool} is not installed: skipped", flush=True)
                continue
            told = asked(tool, length, given.room, given.limit, given.threads)
            rows.append(show({"tool": tool, "length": length, "threads": given.threads, **told}))
    save("beside-lens", "cpu", rows)


if __name__ == "__main__":
    main()
