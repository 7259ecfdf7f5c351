"""`attlas roofline`: which layers of a decode step wait for memory, and which compute."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from attlas.compare.intensity import experts as mixture
from attlas.compare.intensity import grouped, positive
from attlas.compare.intensity import latent as absorbed


def roofline(
    heads: Annotated[int, typer.Option(help="Query heads.")] = 128,
    head_dim: Annotated[int, typer.Option(help="Width of a head.")] = 128,
    kv_heads: Annotated[int, typer.Option(help="Key heads of the grouped layer.")] = 8,
    latent: Annotated[int, typer.Option(help="Width of the latent.")] = 512,
    rotary: Annotated[int, typer.Option(help="Width of the rotary key beside it.")] = 64,
    experts: Annotated[int, typer.Option(help="Experts of the MoE layer.")] = 256,
    active: Annotated[int, typer.Option(help="Experts that a token takes.")] = 8,
    dim: Annotated[int, typer.Option(help="Width of the MoE layer's inputs.")] = 7168,
    width: Annotated[int, typer.Option(help="Width inside an expert.")] = 2048,
    dtype_bytes: Annotated[int, typer.Option(help="Bytes a number.")] = 2,
    batch: Annotated[int, typer.Option(help="Sequences decoded together.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens in each cache.")] = 4096,
    ridge: Annotated[float, typer.Option(help="FLOP/byte from which on the machine computes.")] = 295.0,
) -> None:
    """FLOPs, bytes and FLOP/byte of a decode step: MHA, GQA, MQA, MLA and an MoE layer.

    Sizes are DeepSeek-V3's unless given, and the ridge an H100's (989 TFLOP/s over 3.35 TB/s).
    """
    positive(ridge=ridge)
    sizes = {"heads": heads, "length": length, "batch": batch, "dtype_bytes": dtype_bytes}
    rows = {
        "MHA": grouped(kv_heads=heads, head_dim=head_dim, **sizes),
        f"GQA {kv_heads}": grouped(kv_heads=kv_heads, head_dim=head_dim, **sizes),
        "MQA": grouped(kv_heads=1, head_dim=head_dim, **sizes),
        f"MLA {latent}+{rotary}": absorbed(latent=latent, rotary=rotary, **sizes),
        f"MoE {active}/{experts}": mixture(
            experts=experts, active=active, dim=dim, width=width, batch=batch,
            dtype_bytes=dtype_bytes,
        ),
    }  # fmt: skip
    table = Table("layer", title=f"a decode step of {batch} × {length} tokens, ridge {ridge:g}")
    for column in ("FLOPs", "bytes", "FLOP/byte", "limited by"):
        table.add_column(column, justify="right")
    for name, work in rows.items():
        limit = "memory" if work.intensity < ridge else "compute"
        table.add_row(
            name, f"{work.flops:.3g}", f"{work.bytes:.3g}", f"{work.intensity:.4g}", limit
        )
    Console().print(table)
