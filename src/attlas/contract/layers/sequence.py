"""Checks of layers along the sequence: causality, padding, batches, decoding step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attlas.attach.own import roomy
from attlas.contract.measure import Measure, Subject, check, finite, holds, refuses, same
from attlas.remembering import Unasked


def _inputs(layer: object, batch: int = 2, tokens: int = 11) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, tokens, layer.dim, dtype=torch.float64)  # type: ignore[attr-defined]


def _keeps_keys(subject: Subject) -> bool:
    return subject.causal_form and subject.object.supports.cache == "keys"


@check("layer")
def causality(subject: Subject) -> Iterator[Measure]:
    """Changing the future never changes the past; without a causal form, causal is refused."""
    if not subject.causal_form:
        yield refuses("causal=True", lambda: subject.layer(causal=True), "causal")
        return
    for case, options in subject.forms():
        if not options.get("causal"):
            continue
        layer = subject.layer(**options)
        x = _inputs(layer)
        for now in (1, 5, 10):
            changed = x.clone()
            changed[:, now:] = 10 * torch.randn_like(x[:, now:])
            yield same(f"{case} from {now} on", layer(changed)[:, :now], layer(x)[:, :now])


@check("layer")
def padding(subject: Subject) -> Iterator[Measure]:
    """Tokens padded left, right or not at all get the same answers, whatever the padding holds."""
    if subject.object.supports.masks == "none":
        layer = subject.layer()
        valid = torch.ones(2, 11, dtype=torch.bool)
        yield refuses("padding", lambda: layer(_inputs(layer), mask=valid), "mask")
        return
    for case, options in subject.forms():
        layer = subject.layer(**options)
        x = _inputs(layer, tokens=6)
        alone = layer(x)
        junk = 10 * torch.randn(2, 3, layer.dim, dtype=torch.float64)
        for side in ("left", "right"):
            parts, valid = (junk, x), torch.tensor([False] * 3 + [True] * 6)
            if side == "right":
                parts, valid = (x, junk), valid.flip(0)
            y = layer(torch.cat(parts, dim=1), mask=valid.expand(2, -1))[:, valid]
            yield same(f"{case} {side}", y, alone)
        # Between the tokens of a row, and rows of different lengths in one batch.
        valid = torch.tensor([True, False, True, True, False, False, True, True, True])
        mixed = torch.cat((junk, x), dim=1).clone()
        mixed[:, valid] = x
        mixed[:, ~valid] = junk
        if subject.object.supports.gaps:
            y = layer(mixed, mask=valid.expand(2, -1))[:, valid]
            yield same(f"{case} between", y, alone)
        else:
            call = partial(layer, mixed, mask=valid.expand(2, -1))
            yield refuses(f"{case} between", call, "mask")
        valid = torch.tensor([[False] * 3 + [True] * 6, [True] * 9])
        both = torch.cat((junk, x), dim=1)
        mixed = layer(both, mask=valid)
        yield same(f"{case} mixed", mixed[0, 3:], alone[0])
    added = torch.zeros(2, 9).masked_fill(~valid, -torch.inf)
    yield same("added to scores", layer(both, mask=added), mixed)
    yield refuses("a bias", lambda: layer(both, mask=added.nan_to_num(neginf=-0.5)), "mask")


@check("layer")
def masks(subject: Subject) -> Iterator[Measure]:
    """Hidden pairs get no weight, whether a pattern or a tensor hides them."""
    from attlas.masks import causal, dense, window

    layer = subject.layer()
    x = _inputs(layer)
    tokens = x.shape[1]
    if subject.object.supports.masks != "pairs" and not subject.causal_form:
        yield refuses("causal", lambda: layer(x, mask=causal), "mask")
    pattern = window(3)
    if subject.object.supports.masks != "pairs":
        pairs = torch.ones(2, 1, tokens, tokens, dtype=torch.bool)
        yield refuses("pattern", lambda: layer(x, mask=pattern), "mask")
        yield refuses("tensor", lambda: layer(x, mask=pairs), "mask")
        yield refuses("its own pattern", lambda: subject.layer(mask=pattern), "mask")
        return
    pairs = dense(pattern, tokens, tokens)
    hidden = layer.weights(x, mask=pattern).masked_fill(pairs, 0.0)
    yield same("pattern", hidden, torch.zeros_like(hidden))
    yield same("pattern and tensor", layer(x, mask=pairs), layer(x, mask=pattern))
    added = torch.zeros(2, 1, tokens, tokens).masked_fill(~pairs, torch.finfo(torch.float32).min)
    yield same("added to scores", layer(x, mask=added), layer(x, mask=pattern))
    alike, every = pairs[:, :, 4:5], pairs[:, :, 4:5].expand(2, 1, tokens, tokens)
    yield same("the same for each query", layer(x, mask=alike), layer(x, mask=every))
    own = subject.layer(mask=pattern)
    yield same("its own pattern", own(x), layer(x, mask=pattern))


@check("layer")
def decoding(subject: Subject) -> Iterator[Measure]:
    """Prefill and then steps give what one pass gives; so do chunks."""
    if not subject.causal_form:
        yield refuses("no causal form", lambda: subject.layer().init_cache(), "causal")
        return
    for case, options in subject.forms():
        if not options.get("causal"):
            continue
        layer = subject.layer(**options)
        x = _inputs(layer)
        at_once = layer(x)
        for name, sizes in {
            "steps": [5] + [1] * 6,
            "chunks": [4, 4, 3],
            "all steps": [1] * 11,
        }.items():
            cache = layer.init_cache()
            parts = [layer(part, cache=cache) for part in x.split(sizes, dim=1)]
            yield same(f"{case} {name}", torch.cat(parts, dim=1), at_once)


@check("layer", when=lambda subject: subject.causal_form)
def decoding_padded(subject: Subject) -> Iterator[Measure]:
    """Steps after a prompt padded on the left give what they give without padding."""
    for case, options in subject.forms():
        if not options.get("causal"):
            continue
        layer = subject.layer(**options)
        x = _inputs(layer)
        alone, cache = layer(x), layer.init_cache()
        junk = 10 * torch.randn(2, 3, layer.dim, dtype=torch.float64)
        tokens = torch.cat((junk, x), dim=1)
        valid = torch.tensor([False] * 3 + [True] * 11).expand(2, -1)
        seen, parts = 0, []
        for part in tokens.split([8] + [1] * 6, dim=1):
            seen += part.shape[1]
            parts.append(layer(part, mask=valid[:, :seen], cache=cache))
        yield same(case, torch.cat(parts, dim=1)[:, 3:], alone)


@check("layer", when=lambda subject: subject.causal_form)
def static_cache(subject: Subject) -> Iterator[Measure]:
    """Transformers' StaticCache, whose slots are there before they are filled, gives the same."""
    from attlas.hf.caches import StaticCache
    from attlas.hf.models import LlamaConfig

    layer = subject.layer(causal=True)
    x = _inputs(layer)
    if subject.object.supports.cache == "state":
        static = StaticCache(config=LlamaConfig(num_hidden_layers=1), max_cache_len=16)
        yield refuses("no room for a state", lambda: layer(x, cache=static), "cache")
        return
    config = LlamaConfig(
        hidden_size=layer.dim, num_attention_heads=layer.heads, num_key_value_heads=layer.kv_heads,
        head_dim=layer.head_dim, num_hidden_layers=1,
    )  # fmt: skip
    cache = StaticCache(config=config, max_cache_len=16)
    parts = [layer(part, cache=cache) for part in x.split([5] + [1] * 6, dim=1)]
    yield same("16 slots for 11", torch.cat(parts, dim=1), layer(x))


@check("layer", when=lambda subject: _keeps_keys(subject) and roomy(subject.object))
def room(subject: Subject) -> Iterator[Measure]:
    """A lone query gets the same with hidden keys behind the newest, which a recorded step has room for,
    or is refused."""
    layer = subject.layer(causal=True)
    x, given = _inputs(layer), []
    for _ in range(2):  # a layer may remember
        cache = layer.init_cache()
        layer(x[:, :-1], cache=cache)
        given.append(layer.prepare(x[:, -1:], cache=cache))
    (*alone, inputs), (q, k, v, others) = given

    def behind(t: Tensor) -> Tensor:
        return torch.cat((t, 10 * torch.randn_like(t[:, :, :3])), dim=2)

    there = torch.arange(k.shape[2] + 3)[None, None, None] < k.shape[2]
    carried = {name: behind(t) for name, t in others.carried.items()}
    places = Unasked(lambda: torch.arange(k.shape[2] + 3))
    others = replace(others, pairs=there, key_positions=places, given=True, carried=carried)
    try:
        found = layer.attend(q, behind(k), behind(v), others)
    except (ValueError, RuntimeError) as error:
        yield holds("refused", bool(str(error)), "without a reason")
        return
    yield same("three hidden", found, layer.attend(*alone, inputs))


@check("layer", when=lambda subject: subject.causal_form)
def beams(subject: Subject) -> Iterator[Measure]:
    """A cache reordered over the batch, as beam search does, goes on with the reordered rows."""
    layer = subject.layer(causal=True)
    x, order = _inputs(layer, batch=3), torch.tensor([2, 0, 2])
    cache = layer.init_cache()
    layer(x[:, :8], cache=cache)
    cache.reorder_cache(order)
    steps = [layer(x[order, at : at + 1], cache=cache) for at in range(8, 11)]
    yield same("after 8 tokens", torch.cat(steps, dim=1), layer(x)[order, 8:])


@check("layer", when=lambda subject: subject.causal_form)
def taking_back(subject: Subject) -> Iterator[Measure]:
    """Tokens taken back from a cache, as assisted decoding does, leave nothing behind; or are refused."""
    layer = subject.layer(causal=True)
    x, cache = _inputs(layer), layer.init_cache()
    if hasattr(cache, "activate_past_recording"):  # of windows, as generation does; not in all versions
        cache.activate_past_recording()
    layer(torch.cat((x[:, :7], 10 * torch.randn_like(x[:, 7:])), dim=1), cache=cache)
    if not subject.object.supports.takes_back:
        yield refuses("remembers more than keys", lambda: cache.crop(-4), "tokens_to_remove")
        return
    cache.crop(-4)
    yield same("4 of 11", layer(x[:, 7:], cache=cache), layer(x)[:, 7:])


@check("layer", when=lambda subject: subject.causal_form and subject.object.supports.cache == "state")
def constant_state(subject: Subject) -> Iterator[Measure]:
    """What a cache holds does not grow with the tokens that it has seen."""
    layer = subject.layer(causal=True)
    x, cache, held = _inputs(layer, tokens=64), layer.init_cache(), []
    for part in x.split([8, 1, 55], dim=1):
        layer(part, cache=cache)
        state = cache.layers[0]
        held.append(sum(t.nbytes for t in state.states.values()))
        yield holds(f"{state.seen} tokens keys", state.keys is None, "keys are kept")
    yield holds("bytes", 0 < held[0] == held[1] == held[2], f"bytes after 8, 9, 64 tokens: {held}")
    yield holds("length", cache.get_seq_length() == 64, f"tells {cache.get_seq_length()} of 64")


@check("layer")
def repeated_tokens(subject: Subject) -> Iterator[Measure]:
    """The same token over and over gives finite outputs and gradients."""
    for case, options in subject.forms():
        layer = subject.layer(**options)
        x = _inputs(layer)[:, :1].repeat(1, 7, 1).requires_grad_()
        y = layer(x)
        y.sum().backward()
        yield finite(case, y, x.grad)


@check("layer", when=lambda subject: subject.reduces_to is not None)
def reduces_to(subject: Subject) -> Iterator[Measure]:
    """In its declared special case it is the other mechanism."""
    from attlas.catalog import registry

    reduction = subject.reduces_to
    assert reduction is not None
    other = registry.find(reduction.to).object
    # What knows no other form than the causal one says so to a mechanism that knows both.
    causal = {} if subject.object.supports.bidirectional else {"causal": True}
    for case, options in subject.forms():
        layer = subject.layer(noise=0.0, **reduction.options, **options)
        plain = other(
            dim=layer.dim, heads=layer.heads, head_dim=layer.head_dim, **{**causal, **options}
        )
        plain = plain.double().eval()
        with torch.no_grad():
            reduction.align(layer, plain)
        x = _inputs(layer)
        yield same(f"{case} to {reduction.to}", layer(x), plain(x))


@check("layer", when=lambda subject: subject.object.supports.bidirectional)
def told_positions(subject: Subject) -> Iterator[Measure]:
    """A token's place is what it is told, not where it lies in the tensor: tokens in another order, told
    their positions, get the same answers; or positions that do not follow one another are refused."""
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    at = torch.tensor([0, 2, 3, 7, 8, 11, 12])
    causal: dict[str, Any] = {"causal": False} if subject.causal_form else {}
    for name in (None, "rope", "alibi"):
        if name is not None and not subject.takes(position=name):
            continue
        layer = subject.layer(position=name, **causal) if name else subject.layer(**causal)
        x = _inputs(layer, tokens=7)
        if subject.object.supports.counts:
            yield refuses(f"{name}", partial(layer, x, positions=at), "positions")
            yield same(f"{name} in order", layer(x, positions=torch.arange(7)), layer(x))
            continue
        moved = layer(x[:, order], positions=at[order])
        yield same(f"{name}", moved, layer(x, positions=at)[:, order])
        each = torch.stack((at, 2 * at))
        alone = [layer(x[i : i + 1], positions=each[i]) for i in range(2)]
        yield same(f"{name} row by row", layer(x, positions=each), torch.cat(alone))


@check("layer", when=lambda subject: subject.causal_form and not subject.object.supports.counts)
def told_while_decoding(subject: Subject) -> Iterator[Measure]:
    """Positions told step by step give what they give at once."""
    at = torch.tensor([0, 2, 3, 7, 8, 11, 12])
    for name in (None, "rope", "alibi"):
        if name is not None and not subject.takes(position=name):
            continue
        options: dict[str, Any] = {"causal": True, **({"position": name} if name else {})}
        layer = subject.layer(**options)
        x, cache = _inputs(layer, tokens=7), layer.init_cache()
        parts = [
            layer(x[:, s:e], positions=at[s:e], cache=cache) for s, e in ((0, 3), (3, 4), (4, 7))
        ]
        yield same(f"{name}", torch.cat(parts, dim=1), layer(x, positions=at))
