"""`Attention` beside `torch.nn.MultiheadAttention` (CPU) and bare SDPA with projections (GPU).

On a CPU also what it asks of Python besides bare SDPA, on tensors that hold next to nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache

import attlas
from common import paired_ratio, save, show, spent

#: Tokens of a call that costs nothing but Python.
TOKENS = torch.randn(1, 4, 32)


class Bare(nn.Module):
    """What one writes by hand: four projections and one SDPA call; with rotary positions and a cache."""

    def __init__(self, dim: int, heads: int, *, kv_heads: int = 0, rotary: bool = False) -> None:
        super().__init__()
        self.heads, width = heads, dim // heads * (kv_heads or heads)
        self.q, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(dim, width, bias=False) for _ in range(2))
        self.grouped = width != dim
        steps = torch.arange(0, dim // heads, 2) / (dim // heads)
        self.frequencies = 10000.0**-steps if rotary else None

    def forward(self, x: Tensor, cache: DynamicCache | None = None) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = (
            p(x).view(batch, tokens, -1, dim // self.heads).transpose(1, 2)
            for p in (self.q, self.k, self.v)
        )
        seen = 0 if cache is None else cache.get_seq_length(0)
        if self.frequencies is not None:
            angles = torch.arange(seen, seen + tokens)[:, None] * self.frequencies
            cos, sin = angles.cos(), angles.sin()
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, 0)
        out = scaled_dot_product_attention(
            q, k, v, is_causal=seen == 0, enable_gqa=self.grouped
        )
        return self.o(out.transpose(1, 2).flatten(2))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Torch(nn.Module):
    """torch's own layer, on its fastest settings."""

    def __init__(self, dim: int, heads: int, length: int) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(dim, heads, bias=False, batch_first=True)
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, attn_mask=self.mask, is_causal=True, need_weights=False)[0]


def cases(device: str) -> list[tuple[int, int, int, int]]:
    """(batch, length, dim, heads)"""
    if device == "cuda":
        return [(4, 1024, 2048, 16), (4, 2048, 2048, 16), (1, 8192, 2048, 16), (1, 32768, 2048, 16)]
    return [(1, 128, 512, 8), (4, 256, 512, 8), (1, 1024, 512, 8), (1, 2048, 512, 8)]


def python_on_cpu(rounds: int) -> list[dict[str, object]]:
    """What a layer asks of Python besides one written by hand; a step has eight tokens behind it."""
    rows = []
    options = ({}, {"kv_heads": 1}, {"position": "rope"})
    for given in options:
        ours = attlas.make("softmax", dim=32, heads=2, causal=True, **given)
        theirs = Bare(32, 2, kv_heads=given.get("kv_heads", 0), rotary="position" in given)
        calls = {
            "forward": without_gradients(forward),
            "forward+backward": both,
            "a step": without_gradients(stepping()),
        }
        for what, run in calls.items():
            taken = spent(partial(run, ours), partial(run, theirs), rounds=rounds, calls=40)
            rows.append(show({"what": f"python, {what}", "options": given, **taken}))
    return rows


def forward(model: nn.Module) -> Tensor:
    return model(TOKENS)


def both(model: nn.Module) -> object:
    return torch.autograd.grad(model(TOKENS).sum(), list(model.parameters()))


def stepping() -> Callable[[nn.Module], Tensor]:
    """A step of one token, of a model with a cache of its own that is cut before it grows long."""
    caches: dict[nn.Module, DynamicCache] = {}

    def step(model: nn.Module) -> Tensor:
        cache = caches.setdefault(model, DynamicCache())
        if cache.get_seq_length(0) in (0, 48):
            cache.crop(0)
            model(TOKENS[:, :1].expand(1, 8, 32), cache=cache)
        return model(TOKENS[:, :1], cache=cache)

    return step


def without_gradients(run: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], Tensor]:
    def call(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return run(model)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    device, rows = options.device, []
    if device == "cpu":
        save("layers-python", device, python_on_cpu(rounds=101))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for batch, length, dim, heads in cases(device):
        ours = attlas.make("softmax", dim=dim, heads=heads, causal=True)
        theirs = Bare(dim, heads) if device == "cuda" else Torch(dim, heads, length)
        ours, theirs = (m.to(device, dtype) for m in (ours, theirs))
        x = torch.randn(batch, length, dim, device=device, dtype=dtype)

        def forward(model: nn.Module, x: Tensor = x) -> Tensor:
            with torch.no_grad():
                return model(x)

        def both(model: nn.Module, x: Tensor = x) -> None:
            model(x).sum().backward()
            model.zero_grad(set_to_none=True)

        for what, run in (("forward", forward), ("forward+backward", both)):
            training = what != "forward"
            ours.train(training), theirs.train(training)
            timed = paired_ratio(
                lambda run=run, m=ours: run(m), lambda run=run, m=theirs: run(m),
                rounds=options.rounds, device=device,
            )  # fmt: skip
            row = {"what": what, "batch": batch, "length": length, "dim": dim, "heads": heads,
                   "against": "bare SDPA" if device == "cuda" else "MultiheadAttention"}  # fmt: skip
            rows.append(show({**row, **timed}))
    save("layers", device, rows)


if __name__ == "__main__":
    main()
