"""The attention function that attached models call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attlas import masks, ops
from attlas.attach.blocks import weight_blocks
from attlas.attach.call import Call, ForwardPass
from attlas.attach.reading import (
    done_with,
    filled,
    mask_of_chosen,
    refuse_joined,
    refuse_strangers,
)
from attlas.attach.scores import chained, changed_by, in_slots
from attlas.attach.slots import boolean, both, in_original_positions, original_positions_of, shown
from attlas.attach.state import ATTACHED, NOBODY, Attachment
from attlas.attach.under import recording
from attlas.errors import UserError
from attlas.hf.caches import refuse_other
from attlas.hf.interface import sdpa_attention_forward
from attlas.storage.layer import StoredLayer

#: Limit (queries × group size) for attending directly to encoded keys.
ROWS = 64

#: Arguments of other attention functions, with what a user may do instead.
REFUSED = {
    "cu_seq_lens_q": "packed sequences of FlashAttention; give position_ids or an attention_mask",
    "cu_seq_lens_k": "packed sequences of FlashAttention; give position_ids or an attention_mask",
    "max_length_q": "packed sequences of FlashAttention; give position_ids or an attention_mask",
    "max_length_k": "packed sequences of FlashAttention; give position_ids or an attention_mask",
    "kernel_options": "an option of FlexAttention; leave it out",
    "block_indices": "blocks of keys that the model chose, which only its own kernels read",
    "sinks": "sink logits of every query, which only the model's eager attention adds",
}


def attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads query dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch query heads value_dim"], None]:
    """Attention under the attachment that holds `module`, with Transformers' own signature.

    Without parts it is Transformers' SDPA function, unless the layer has soft caps or sink logits,
    which SDPA cannot do. So it is for modules that belong to no session and share their configuration
    with one that does (a decoder whose encoder is attached to).

    Raises:
        ValueError: an argument that cannot be honoured, by its name.
    """
    held = ATTACHED.get(module, NOBODY)
    for name, why in REFUSED.items():
        if kwargs.get(name) is not None:
            raise UserError(f"attach cannot honour {name}: {why}")
    # A plain cache is passed on by some models of 5.24, which have filled it already.
    refuse_other("cache", kwargs.get("cache"))
    refuse_joined(module, attention_mask)
    attention_mask = mask_of_chosen(kwargs.get("indices"), key, attention_mask)
    if attention_mask is None and _is_causal(module, kwargs):
        key, value = filled(held, query, key, value)
    simple = kwargs.get("softcap") is None and kwargs.get("s_aux") is None
    at = None if held.direct and simple else held.at(module)
    if at is None and simple:
        return _plain(module, query, key, value, attention_mask, scaling, dropout, kwargs), None
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attended(held, at, module, query, key, value, attention_mask, scaling, dropout, kwargs), None


def attended(
    held: Attachment,
    at: tuple[int, ForwardPass] | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
    kwargs: dict[str, Any],
    features: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Float[Tensor, "batch query heads value_dim"]:
    """One layer's attention with all parts at work.

    Args:
        held: the attachment.
        at: the layer and the forward call; None for a module that is no layer of the model's.
        module: the layer's attention module.
        query: rotated.
        key: as the cache gives them.
        value: likewise.
        mask: the model's, booleans whose keys are slots, or columns where a cache drops tokens.
        scaling: of the products.
        dropout: share of weights dropped.
        kwargs: what else the model passed on.
        features: what the layer makes of queries and keys before it multiplies them.
    """
    if at is None:
        held, at = NOBODY, (-1, ForwardPass())
    call = _call(held, at, module, query, key, value, mask, scaling, kwargs, features)
    found = (part.attend(call) for part in held.with_hook("attend", call.layer))
    heads = next((heads for heads in found if heads is not None), None)
    weighed = heads is None and held.weighs(call.layer)
    if weighed:
        heads = _weighed(held, call, dropout)
    elif heads is None:
        heads = _heads(call, mask, dropout)
    for part in held.with_hook("output", call.layer):
        heads = part.output(call, heads)
    _look(held, call, recorded=weighed)
    return heads


def _call(
    held: Attachment,
    at: tuple[int, ForwardPass],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    kwargs: dict[str, Any],
    features: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None,
) -> Call:
    """The call, complete, and then what the parts do to it, stage by stage."""
    layer, forward_pass = at
    source = held.sources.get(layer, layer)
    forward_pass = forward_pass.last(query.shape[2]) if source != layer else forward_pass
    call = Call(
        layer=layer,
        source=source,
        module=module,
        q=query,
        k=key,
        v=value,
        scaling=scaling,
        mask=None,
        forward_pass=forward_pass,
        is_causal=_is_causal(module, kwargs),
        sinks=kwargs.get("s_aux"),
        kwargs=kwargs,
    )
    if forward_pass.cache is not None and 0 <= source < len(forward_pass.cache.layers):
        call.cache_layer = forward_pass.cache.layers[source]
    refuse_strangers(call)
    call.score_mod = changed_by(call)
    call.held = features is None and _as_held(held, call)
    if not call.held:
        _with_keys(call, mask)
        if features is not None:
            call.q, call.k = features(call.q, call.k)
    for part in held.with_hook("position", layer):
        call.q, call.k = part.position(call, call.q, call.k)
    for part in held.with_hook("values", layer):
        call.v = part.values(call, call.v)
    chosen = (part.select(call) for part in held.with_hook("select", layer))
    call.chosen = next((choice for choice in chosen if choice is not None), None)
    if call.held:
        return call
    if call.chosen is not None:
        call.mask = both(call, shown(call, call.chosen))
    for part in held.with_hook("mask", layer):
        call.mask = both(call, part.mask(call))
    for part in held.with_hook("score_mod", layer):
        call.score_mod = chained(call.score_mod, part.score_mod(call))
    call.changers = tuple(held.with_hook("normalize", layer))
    return call


def _as_held(held: Attachment, call: Call) -> bool:
    """Whether this call is attended to in the form in which the cache holds its keys.

    It is when the prompt is over, the queries are few, and nobody looks at the keys one by one.
    """
    layer = call.cache_layer
    if not isinstance(layer, StoredLayer) or not (layer.managed and layer.compressed):
        return False
    if layer.latent:
        return False  # the model makes keys of what the cache holds
    few = call.q.shape[2] * call.groups <= ROWS
    return few and call.is_causal and call.score_mod is None and not held.wants_keys(call.layer)


def _with_keys(call: Call, mask: Tensor | None) -> None:
    """All keys that the cache holds, in slots, and which of them each query may attend to."""
    layer = call.cache_layer
    compressed = isinstance(layer, StoredLayer) and layer.managed and layer.compressed
    if compressed and not layer.latent:
        call.k, call.v, call.original_positions = layer.read()
        layer.read_bytes = layer.nbytes
        call.score_mod = chained(call.score_mod, _weights_of_slots(call, layer))
    else:
        call.original_positions = original_positions_of(call)
        if compressed:
            layer.read_bytes = layer.nbytes
    call.mask = call.model_mask = in_original_positions(call, boolean(mask))


def _weights_of_slots(call: Call, layer: StoredLayer) -> Any:
    """What scores gain of keys that stand for several tokens; None where there are none."""
    bias = layer.biases()
    if bias is None:
        return None
    groups = call.groups

    def weighted(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        changed: Tensor = s + bias[b, h // groups, k].to(s.dtype)
        return changed

    return weighted


def _heads(
    call: Call, mask: Tensor | None, dropout: float
) -> Float[Tensor, "batch query heads value_dim"]:
    """The attention itself: over encoded keys where the cache holds such, else SDPA or by blocks."""
    if call.held:
        heads = call.cache_layer.attend(
            call.q, scale=call.scaling, visible=boolean(mask), sinks=call.sinks, chosen=call.chosen
        )
        return heads.transpose(1, 2).contiguous()  # type: ignore[no-any-return]
    grouped = call.groups == 1 or hasattr(call.module, "num_key_value_groups")
    if call.score_mod is None and call.sinks is None and grouped:
        causal = {"is_causal": call.is_causal}
        return _plain(call.module, call.q, call.k, call.v, call.mask, call.scaling, dropout, causal)
    _refuse_dropout(dropout)
    pattern: Tensor | masks.Mask | None = call.mask
    offset = 0
    if pattern is None and call.is_causal and call.q.shape[2] > 1:
        pattern, offset = masks.causal, call.k.shape[2] - call.q.shape[2]
    heads, lse = ops.attend(
        call.q, call.k, call.v, mask=pattern, score_mod=in_slots(call, offset),
        scale=call.scaling, return_lse=True, q_offset=offset,
    )  # fmt: skip
    if call.sinks is not None:
        share = torch.sigmoid(lse - call.sinks.to(lse.dtype)[:, None])
        heads = heads * share[..., None].to(heads.dtype)
    return heads.transpose(1, 2).contiguous()


def _plain(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None,
    dropout: float, kwargs: dict[str, Any],
) -> Float[Tensor, "batch query heads value_dim"]:  # fmt: skip
    """Transformers' SDPA; attlas's own of new tokens that see all before them, which has no mask."""
    queries, keys = q.shape[2], k.shape[2]
    if mask is None and 1 < queries < keys and _is_causal(module, kwargs):
        if kwargs.get("position_bias") is None:
            heads = ops.attend(q, k, v, mask=masks.causal, scale=scaling, dropout=dropout)
            return heads.transpose(1, 2).contiguous()
        mask = ops.as_dense(masks.causal, queries, keys, keys - queries, q.device)
    heads, _ = sdpa_attention_forward(
        module, q, k, v, mask, dropout=dropout, scaling=scaling, **kwargs
    )
    return heads  # type: ignore[no-any-return]


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    told = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if told is None else told)


def _weighed(
    held: Attachment, call: Call, dropout: float
) -> Float[Tensor, "batch query heads value_dim"]:
    """Attention from weights that parts change or differentiate, block by block of queries."""
    _refuse_dropout(dropout)
    pieces = []
    for weights, queries, keys in weight_blocks(call):
        for recorder in () if held.again else held.recorders_of(call.layer):
            with torch.set_grad_enabled(recorder.wants_gradients and torch.is_grad_enabled()):
                wanted = recorder.where.heads_of(call.layer)
                if wanted is None or not recorder.wants_gradients:
                    show(recorder, call, weights, queries, keys)
                    continue
                # What is shown goes back in, so that the output is made of it and it has a gradient.
                at = torch.tensor(wanted, device=weights.device)
                shown = weights[:, at]
                recorder.update(call, shown, queries, keys if keys.ndim == 1 else keys[:, at])
                weights = weights.index_copy(1, at, shown)
        values = call.v[:, :, : weights.shape[-1]]
        pieces.append(ops.grouped_product(weights.to(values.dtype), values))
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous()


def _refuse_dropout(dropout: float) -> None:
    if dropout:
        raise UserError(
            "attach cannot honour dropout together with changed scores; call model.eval()"
        )


def _look(held: Attachment, call: Call, recorded: bool) -> None:
    """Show the call to recorders, unless they have seen its weights, and to observers."""
    if held.again or recording():
        return
    recorders = [] if recorded else held.recorders_of(call.layer)
    with torch.no_grad():
        if recorders:
            chosen = [recorder.where.heads_of(call.layer) for recorder in recorders]
            union = sorted({head for heads in chosen for head in heads or ()})
            some = None if any(heads is None for heads in chosen) or call.changers else union
            for weights, queries, keys in weight_blocks(call, heads=some):
                for recorder in recorders:
                    show(recorder, call, weights, queries, keys, some)
    done = done_with(held, call)
    for part in held.with_hook("observe", call.layer):
        shown = call if part not in held.keepers else done
        if shown is None:
            continue
        with torch.set_grad_enabled(part.wants_gradients and torch.is_grad_enabled()):
            part.observe(shown)
    if done is not None and isinstance(done.cache_layer, StoredLayer) and not done.forward_pass.chunked:
        done.cache_layer.compressed = True


def show(
    recorder: Any, call: Call, weights: Tensor, queries: Tensor, keys: Tensor,
    among: list[int] | None = None,
) -> None:  # fmt: skip
    """A block of weights, those of the heads that a recorder looks at; `among` says which are there."""
    wanted = recorder.where.heads_of(call.layer)
    if wanted is not None:
        at = [head if among is None else among.index(head) for head in wanted]
        weights = weights[:, at]
        keys = keys if keys.ndim == 1 else keys[:, at]
    recorder.update(call, weights, queries, keys)
