"""`attlas roofline`: which layers of a decode step wait for memory, and which compute."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from attlas.compare.intensity import experts as mixture
from attlas.compare.intensity import grouped, positive
from attlas.compare.intensity import latent as absorbed
from attlas.compare.tiles import tiles_table
from attlas.errors import UserError


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
    neighborhood: Annotated[
        str, typer.Option(help="Grid of neighbourhood attention, 128x128: shows its tiles instead.")
    ] = "",
    window: Annotated[str, typer.Option(help="Its keys along each axis, 13 or 13x13.")] = "",
    stride: Annotated[str, typer.Option(help="Its queries that share a window.")] = "1",
    dilation: Annotated[str, typer.Option(help="Tokens from one visible key to the next.")] = "1",
    causal: Annotated[str, typer.Option(help="1 for its causal axes, 0 for others, 1x0x0.")] = "0",
    q_tile: Annotated[str, typer.Option(help="Queries of a tile, 8x16; the best unless given.")] = "",
    kv_tile: Annotated[str, typer.Option(help="Keys of a tile.")] = "",
) -> None:
    """FLOPs, bytes and FLOP/byte of a decode step: MHA, GQA, MQA, MLA and an MoE layer.

    Sizes are DeepSeek-V3's unless given, and the ridge an H100's (989 TFLOP/s over 3.35 TB/s). With a
    neighborhood, the share of tiles that it visits and the speedup that can be had.
    """
    if neighborhood:
        if not window:
            raise UserError("window is needed with neighborhood, say 13x13")
        table = tiles_table(neighborhood, window, stride, dilation, causal, q_tile, kv_tile)
        Console().print(table)
        return
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
