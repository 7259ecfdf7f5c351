"""Functions on q, k, v. Each has a plain reference and faster routes that agree with it."""

from attlas.ops.attend import ROUTES, Route, attend
from attlas.ops.block_reference import as_lists
from attlas.ops.block_sparse import BLOCK_ROUTES, BlockRoute, block_sparse
from attlas.ops.decode import decode
from attlas.ops.delta import delta_correction
from attlas.ops.exact import exact, product, recomputed, unit, wide
from attlas.ops.fused import fused
from attlas.ops.latent import latent_attend
from attlas.ops.lookahead import LookaheadKeys, lookahead_attend, lookahead_refuses
from attlas.ops.memory_efficient import memory_efficient
from attlas.ops.neighborhood import neighborhood
from attlas.ops.pages import best_pages, page_bounds, page_means, page_scores
from attlas.ops.recurrence import recurrence
from attlas.ops.reference import (
    as_dense,
    divided,
    grouped_product,
    indices,
    merge,
    reference,
    repeated,
    scores_of,
    softmax,
)
from attlas.ops.row_statistics import RowStatistics, row_statistics
from attlas.ops.running import running_mean

__all__ = [
    "BLOCK_ROUTES",
    "ROUTES",
    "BlockRoute",
    "LookaheadKeys",
    "Route",
    "RowStatistics",
    "as_dense",
    "as_lists",
    "attend",
    "best_pages",
    "block_sparse",
    "decode",
    "delta_correction",
    "divided",
    "exact",
    "fused",
    "grouped_product",
    "indices",
    "latent_attend",
    "lookahead_attend",
    "lookahead_refuses",
    "memory_efficient",
    "merge",
    "neighborhood",
    "page_bounds",
    "page_means",
    "page_scores",
    "product",
    "recomputed",
    "recurrence",
    "reference",
    "repeated",
    "row_statistics",
    "running_mean",
    "scores_of",
    "softmax",
    "unit",
    "wide",
]
