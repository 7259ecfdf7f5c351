"""All statistics of `head-roles` beside a plain forward pass: time and peak memory.

    python benchmarks/head_roles.py [--lengths 512 2048] [--shared]           SmolLM2 on a CPU
    python benchmarks/head_roles.py --device cuda [--lengths 8192 32768] [--layers 32]

On a GPU a Llama of 8B's shape, with random weights in bfloat16 and as many layers as asked for. Both take
turns; logits are those of the last token, and no cache is kept. Peaks are of PyTorch's own memory on a
GPU; on a CPU of a process for each, the model included, since memory once taken is not given back.
`--shared` is for a machine where others compute: time is then that of this process on one thread, not of
the clock.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import attlas
from attlas.attach import attach
from common import paired_ratio, save, show, spent

LENGTHS = {"cpu": [512, 2048], "cuda": [8192, 32768]}


def llama(layers: int) -> Any:
    """A Llama of 8B's shape on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
        num_hidden_layers=layers, vocab_size=128256, max_position_embeddings=131072,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval()


def passes(model: Any, length: int, device: str) -> dict[str, Any]:
    """A plain forward pass and one with all statistics, by name."""
    torch.manual_seed(0)
    # Some tokens come often and most seldom, as in a text.
    ids = (torch.rand(1, length) ** 4 * 20000).long().to(device)

    def plain() -> None:
        with torch.no_grad():
            model(ids, use_cache=False, logits_to_keep=1)

    def roles() -> None:
        with torch.no_grad(), attach(model, record=["head-roles"]) as session:
            model(ids, use_cache=False, logits_to_keep=1)
            session["head-roles"]

    return {"plain": plain, "roles": roles}


def peak(name: str, run: Any, length: int, device: str) -> float:
    """MiB at most while it runs."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**20
    command = [sys.executable, __file__, "--peak", name, str(length)]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(json.loads(told.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=LENGTHS, default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shared", action="store_true", help="on a CPU")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    model = llama(given.layers) if given.device == "cuda" else attlas.load("smollm2").eval()
    if given.peak:
        passes(model, int(given.peak[1]), "cpu")[given.peak[0]]()
        told = Path("/proc/self/status").read_text().split("VmHWM:")[1]
        print(json.dumps(int(told.split()[0]) / 2**10))  # getrusage tells of the parent's peak too
        return
    rows = []
    for length in given.lengths or LENGTHS[given.device]:
        both = passes(model, length, given.device)
        plain, roles = both["plain"], both["roles"]
        if given.shared:
            told = spent(roles, plain, rounds=given.rounds, calls=1)
            ours, theirs = told["ours_us"] / 1e3, told["theirs_us"] / 1e3
            timed = {"ours_ms": ours, "theirs_ms": theirs, "ratio": ours / theirs}
        else:
            timed = paired_ratio(roles, plain, rounds=given.rounds, device=given.device, queued=1)
        found = {name: peak(name, run, length, given.device) for name, run in both.items()}
        peaks = {"ours_mib": found["roles"], "theirs_mib": found["plain"]}
        shape = {"model": "8B-shaped" if given.device == "cuda" else "SmolLM2", "length": length}
        layers = {"layers": model.config.num_hidden_layers}
        memory = {**peaks, "memory_ratio": peaks["ours_mib"] / peaks["theirs_mib"]}
        rows.append(show({**shape, **layers, **timed, **memory}))
    save("head-roles", given.device, rows)


if __name__ == "__main__":
    main()
