"""What `attlas roofline --neighborhood` shows: tiles that neighbourhoods touch, see `masks.tiles`."""

from __future__ import annotations

from rich.table import Table

from attlas.errors import UserError
from attlas.masks.neighborhood import Axis, axes_of
from attlas.masks.tiles import best_tiles, visits

#: Queries and keys to a tile: engines' on a CPU, and two of FlexAttention's.
SIZES = ((128, 64), (128, 128), (64, 64))


def tiles_table(
    shape: str, window: str, stride: str, dilation: str, causal: str, q_tile: str, kv_tile: str
) -> Table:
    """Share of tiles visited, and the speedup over full attention that this allows.

    Args:
        shape: of the grid, "128x128"; one number in the others is for all axes.
        window: keys that a query sees.
        stride: queries that share a window.
        dilation: tokens from one visible key to the next.
        causal: 1 for an axis that shows earlier keys alone, 0 for others.
        q_tile: queries of a tile; the best of some sizes unless given.
        kv_tile: keys of a tile.

    Raises:
        UserError: what is no size, does not fit, or one tile without the other.
    """
    lengths = numbers("neighborhood", shape)
    count = len(lengths)
    flags = tuple(value != 0 for value in numbers("causal", causal, count, least=0))
    sizes = ((n, numbers(n, text, count)) for n, text in
             (("window", window), ("stride", stride), ("dilation", dilation)))  # fmt: skip
    try:
        axes = axes_of(lengths, causal=flags, **dict(sizes))
    except ValueError as error:
        raise UserError(str(error)) from None
    if bool(q_tile) != bool(kv_tile):
        raise UserError("q-tile and kv-tile are given together, or neither")
    if q_tile:
        tiles = [(numbers("q-tile", q_tile, count), numbers("kv-tile", kv_tile, count))]
    else:
        tiles = list(dict.fromkeys(best_tiles(axes, *size) for size in SIZES))
    return _table(axes, tiles)


def _table(axes: tuple[Axis, ...], tiles: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> Table:
    ideal = visits(axes, *tiles[0]).ideal
    told = " ".join(
        f"{a.length}:{a.window}/{a.stride}" + f"·{a.dilation}" * (a.dilation > 1) + "c" * a.causal
        for a in axes
    )
    table = Table("queries", title=f"tiles of {told}, {ideal:.3g} × fewer pairs than full attention")
    for column in ("keys", "tiles visited", "share", "hidden pairs", "speedup at best"):
        table.add_column(column, justify="right")
    for q_tile, k_tile in tiles:
        found = visits(axes, q_tile, k_tile)
        table.add_row(
            "×".join(map(str, q_tile)), "×".join(map(str, k_tile)),
            f"{found.visited} of {found.full}", f"{found.share:.2%}",
            f"{1 - found.visible / found.computed:.1%}", f"{found.speedup:.2f} ×",
        )  # fmt: skip
    return table


def numbers(name: str, text: str, count: int | None = None, least: int = 1) -> tuple[int, ...]:
    """Whole numbers that stand with an x between them; one for all axes is repeated.

    Raises:
        UserError: otherwise, naming the option.
    """
    parts = text.lower().replace("×", "x").split("x")
    if not all(part.strip().isdecimal() and int(part) >= least for part in parts):
        raise UserError(f"{name} takes whole numbers of at least {least} as in 16x16, got {text!r}")
    found = tuple(int(part) for part in parts)
    if count is None or len(found) == count:
        return found
    if len(found) != 1:
        raise UserError(f"{name} takes one number, or {count} as neighborhood does, got {text!r}")
    return found * count
