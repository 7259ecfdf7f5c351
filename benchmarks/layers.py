"""`Attention` beside `torch.nn.MultiheadAttention` (CPU) and bare SDPA with projections (GPU)."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import attlas
from common import paired_ratio, save, show


class Bare(nn.Module):
    """What one writes by hand: four projections and one SDPA call."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2)
            for p in (self.q, self.k, self.v)
        )
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(out.transpose(1, 2).flatten(2))


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    device, rows = options.device, []
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
