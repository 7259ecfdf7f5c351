"""Masks: which query may meet which key, as an algebra with lowerings to every route."""

from attlas.masks.algebra import Mask, Shifted
from attlas.masks.bigbird import bigbird
from attlas.masks.given import seen
from attlas.masks.lower import at, block_mask, both, dense, density, grid, hides_nothing, sdpa_flags
from attlas.masks.neighborhood import neighborhood
from attlas.masks.pages import Pages, pages
from attlas.masks.patterns import (
    block,
    blocks,
    by_groups,
    causal,
    dilated,
    document,
    full,
    keys,
    padding,
    per_head,
    prefix,
    sinks,
    strided,
    table,
    window,
)

__all__ = [
    "Mask",
    "Pages",
    "Shifted",
    "at",
    "bigbird",
    "block",
    "block_mask",
    "blocks",
    "both",
    "by_groups",
    "causal",
    "dense",
    "density",
    "dilated",
    "document",
    "full",
    "grid",
    "hides_nothing",
    "keys",
    "neighborhood",
    "padding",
    "pages",
    "per_head",
    "prefix",
    "sdpa_flags",
    "seen",
    "sinks",
    "strided",
    "table",
    "window",
]
