"""Checks of layers: what is wrong is refused, by name."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from attlas.contract.measure import Measure, Subject, check, refuses


@check("layer")
def wrong_sizes(subject: Subject) -> Iterator[Measure]:
    """Sizes that do not fit are a ValueError that names the argument."""
    yield refuses("dim=0", lambda: subject.layer(dim=0), "dim")
    yield refuses("heads=0", lambda: subject.layer(heads=0), "heads")
    yield refuses("10 by 3", lambda: subject.layer(dim=10, heads=3), "heads", "dim")
    yield refuses("kv_heads=3 of 4", lambda: subject.layer(heads=4, kv_heads=3), "kv_heads")
    yield refuses("dropout=1.5", lambda: subject.layer(dropout=1.5), "dropout")


@check("layer")
def wrong_inputs(subject: Subject) -> Iterator[Measure]:
    """Inputs and masks of another shape are a ValueError that names them."""
    layer = subject.layer(dtype=torch.float32)
    x = torch.randn(2, 7, layer.dim)
    yield refuses("another width", lambda: layer(x[..., :-1]), "x")
    yield refuses("no batch", lambda: layer(x[0]), "x")
    short = torch.ones(2, 6, dtype=torch.bool)
    if subject.object.supports.masks == "none":
        return
    yield refuses("mask too short", lambda: layer(x, mask=short), "mask")
    yield refuses("mask of 3 axes", lambda: layer(x, mask=short[None]), "mask")


@check("layer")
def forms_refused(subject: Subject) -> Iterator[Measure]:
    """Contexts and caches that it cannot honour are refused by name, never ignored."""
    layer = subject.layer(dtype=torch.float32)
    x = torch.randn(2, 7, layer.dim)
    if not subject.object.supports.cross:
        yield refuses("context", lambda: layer(x, x), "context")
    elif subject.causal_form:
        causal = subject.layer(dtype=torch.float32, causal=True)
        yield refuses("context when causal", lambda: causal(x, x), "context")
        cache = causal.init_cache()
        yield refuses("context with a cache", lambda: causal(x, x, cache=cache), "context")
    if not subject.object.supports.bidirectional:
        yield refuses("causal=False", lambda: subject.layer(causal=False), "causal")
    if not subject.causal_form:
        from attlas.hf.caches import DynamicCache

        yield refuses("cache", lambda: layer(x, cache=DynamicCache()), "cache")
