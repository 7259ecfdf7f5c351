"""Checks of layers: every size and precision goes in, and the same comes out."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attlas import masks
from attlas.contract.measure import Measure, Subject, check, finite, holds, same
from attlas.supports import Supports

#: One token, an even few, and lengths that no block divides.
LENGTHS = (1, 2, 7, 33)


@check("layer")
def shapes(subject: Subject) -> Iterator[Measure]:
    """[batch, tokens, dim] in, the same out, for odd lengths, batches and head widths."""
    for options in ({}, {"heads": 1}, {"head_dim": 5}, {"head_dim": 3, "heads": 3}):
        if not subject.takes(**options):
            continue
        layer = subject.layer(dtype=torch.float32, **options)
        for batch in (1, 3):
            for length in LENGTHS:
                x = torch.randn(batch, length, layer.dim)
                y = layer(x)
                case = f"batch={batch} tokens={length} {options}"
                yield holds(case, y.shape == x.shape, f"gives {list(y.shape)}")
                yield finite(case, y)


@check("layer", when=lambda subject: subject.takes(heads=4, kv_heads=2))
def grouped_heads(subject: Subject) -> Iterator[Measure]:
    """Grouped key and value heads give what the stages give, and shrink what a cache holds."""
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    held: dict[int, int] = {}
    for kv_heads in (1, 2, 4):
        layer = subject.layer(heads=4, kv_heads=kv_heads)
        q, k, v, inputs = layer.prepare(x)
        held[kv_heads] = sum(x.numel() for x in layer.project(inputs)[1:])
        stages = layer.output(layer.aggregate(layer.weigh(q, k, inputs), v, inputs), inputs)
        yield same(f"kv_heads={kv_heads}", layer(x), stages)
    shrinks = held[1] * 4 == held[2] * 2 == held[4]
    yield holds("cache", shrinks, f"numbers held by kv_heads: {held}")


@check("layer")
def strides(subject: Subject) -> Iterator[Measure]:
    """Inputs that are not contiguous give what contiguous ones give."""
    layer = subject.layer()
    dense = torch.randn(2, 9, layer.dim, dtype=torch.float64)
    views = {
        "transposed": dense.transpose(1, 2).contiguous().transpose(1, 2),
        "every other": dense.repeat_interleave(2, dim=1)[:, ::2],
        "batch last": dense.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    }
    for case, view in views.items():
        yield holds(case, not view.is_contiguous(), "this check's input is contiguous")
        yield same(case, layer(view), layer(dense))


def apart(subject: Subject) -> bool:
    """Whether queries of another sequence do not all hang together."""
    supports: Supports = subject.object.supports
    return supports.cross and supports.bidirectional and supports.queries != "all"


@check("layer", when=apart)
def which_queries(subject: Subject) -> Iterator[Measure]:
    """To another sequence a query attends alone as among others, or as with those before it alone."""
    layer, at = subject.layer(causal=False), torch.arange(6)
    x, context = (torch.randn(2, n, layer.dim, dtype=torch.float64) for n in (6, 9))
    whole = layer(x, context)
    if subject.object.supports.queries == "alone":
        some = [layer(x[:, i : i + 1], context, positions=at[i : i + 1]) for i in at.tolist()]
        yield same("alone", torch.cat(some, dim=1), whole)
    for count in (1, 4):
        yield same(f"the first {count}", layer(x[:, :count], context), whole[:, :count])


@check("layer", when=lambda subject: subject.object.supports.cross)
def cross_attention(subject: Subject) -> Iterator[Measure]:
    """Queries from one sequence, keys from another; keys out of sight change nothing."""
    layer = subject.layer()
    x = torch.randn(2, 5, layer.dim, dtype=torch.float64)
    context = torch.randn(2, 8, layer.dim, dtype=torch.float64)
    y = layer(x, context)
    yield holds("5 from 8", y.shape == x.shape, f"gives {list(y.shape)}")
    yield same("x as its own context", layer(x, x), layer(x))
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[:, 6:] = False
    yield same("padded context", layer(x, context, mask=valid), layer(x, context[:, :6]))
    if subject.object.supports.masks != "pairs":
        return
    for a, b in ((x, context), (context, x)):
        pairs = torch.rand(a.shape[1], b.shape[1], generator=torch.Generator().manual_seed(0)) > 0.4
        told, by_table = pairs.expand(2, 1, -1, -1), masks.table(pairs)
        yield same(f"row {a.shape[1]} is its query", layer(a, b, mask=by_table), layer(a, b, mask=told))
