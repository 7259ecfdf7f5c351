"""The attention function that attached models call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from attlas import masks, ops
from attlas.attach.blocks import weight_blocks
from attlas.attach.call import Call
from attlas.errors import UserError
from attlas.hf.caches import refuse_other
from attlas.hf.interface import sdpa_attention_forward
from attlas.ops.segments import listed
from attlas.positions import ScoreMod
from attlas.storage.layer import Chosen, StoredLayer

if TYPE_CHECKING:
    from attlas.attach.session import Session

#: The session of each attention module of the models attached now.
SESSIONS: dict[nn.Module, Session] = {}

#: Queries times heads of a group that are attended to as the cache holds its keys.
ROWS = 64

#: Arguments of other attention functions, with what a user may do instead.
REFUSED = {
    "cu_seq_lens_q": "packed sequences of FlashAttention; give position_ids or an attention_mask",
    "cu_seq_lens_k": "packed sequences of FlashAttention; give position_ids or an attention_mask",
    "max_length_q": "packed sequences of FlashAttention; give position_ids or an attention_mask",
    "max_length_k": "packed sequences of FlashAttention; give position_ids or an attention_mask",
    "kernel_options": "an option of FlexAttention; leave it out",
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
    """Attention under the session that holds `module`, with Transformers' own signature.

    Without parts it is Transformers' SDPA function, unless the layer has soft caps or sink logits,
    which SDPA cannot do.

    Raises:
        ValueError: an argument that cannot be honoured, by its name.
        RuntimeError: the module belongs to no session.
    """
    session = SESSIONS.get(module)
    if session is None:
        raise RuntimeError(f"{type(module).__name__} is set to attlas but belongs to no session")
    for name, why in REFUSED.items():
        if kwargs.get(name) is not None:
            raise UserError(f"attach cannot honour {name}: {why}")
    # A plain cache is passed on by some models of 5.24, which have filled it already.
    refuse_other("cache", kwargs.get("cache"))
    if session.direct and kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    call = _call(session, module, query, key, value, attention_mask, scaling, kwargs)
    found = (part.attend(call) for part in session.attenders)
    heads = next((heads for heads in found if heads is not None), None)
    if heads is None:
        heads = _heads(session, call, attention_mask, dropout)
    for part in session.editors:
        heads = part.output(call, heads)
    with torch.no_grad():
        _look(session, call)
    return heads, None


def _call(
    session: Session,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> Call:
    step, layer = session.step, session.layers[module]
    if step is None:
        raise UserError("a part needs the model's own call: use model(...), not model.forward(...)")
    causal = kwargs.get("is_causal")
    call = Call(
        layer=layer,
        module=module,
        q=query,
        k=key,
        v=value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask=None,
        step=step,
        is_causal=bool(getattr(module, "is_causal", True) if causal is None else causal),
        sinks=kwargs.get("s_aux"),
        kwargs=kwargs,
    )
    if step.cache is not None and layer < len(step.cache.layers):
        call.cache_layer = step.cache.layers[layer]
    call.score_mod = _score_mod(call, [part.score_mod(call) for part in session.modders])
    chosen = (part.select(call) for part in session.selectors)
    call.chosen = next((choice for choice in chosen if choice is not None), None)
    if not _as_held(session, call):
        _with_keys(session, call, mask)
    return call


def _as_held(session: Session, call: Call) -> bool:
    """Whether this call is attended to in the form in which the cache holds its keys.

    It is when the prompt is over, the queries are few, and nobody looks at the keys one by one.
    """
    layer = call.cache_layer
    if not isinstance(layer, StoredLayer) or not layer.settled:
        return False
    watched = session.recorders or session.maskers or call.score_mod is not None
    few = call.q.shape[2] * call.groups <= ROWS
    return not watched and few and call.is_causal


def _with_keys(session: Session, call: Call, mask: Tensor | None) -> None:
    """All keys that the cache holds, in slots, and which of them each query may attend to."""
    layer = call.cache_layer
    if isinstance(layer, StoredLayer):
        if layer.settled:
            call.k, call.v, call.columns = layer.read()
            layer.read_bytes = layer.nbytes
            if (bias := layer.biases()) is not None:
                call.score_mod = _weighted(call, bias)
    elif (columns := getattr(layer, "columns", None)) is not None:
        call.columns = columns()
    call.mask = call.model_mask = _in_columns(call, mask)
    for part in session.maskers:
        call.mask = _both(call, part.mask(call))
    if call.chosen is not None:
        call.mask = _both(call, _shown(call, call.chosen))


def _weighted(call: Call, bias: Float[Tensor, "batch kv_heads seen"]) -> ScoreMod:
    """The score change in force, and after it what keys have that stand for several tokens."""
    mod, groups = call.score_mod, call.groups

    def weighted(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        changed = s if mod is None else mod(s, b, h, q, k)
        return changed + bias[b, h // groups, k].to(s.dtype)

    return weighted


def _shown(call: Call, chosen: Chosen) -> Bool[Tensor, "batch heads 1 keys"]:
    """Which slots a choice reads."""
    slots = call.k.shape[2]
    at, there = listed(chosen.index, chosen.page, chosen.slots, None)
    shown = torch.zeros(*at.shape[:2], slots + 1, dtype=torch.bool, device=at.device)
    shown.scatter_(2, torch.where(there[:, :, 0], at, slots).long(), True)
    shown = shown[..., :slots]
    shown[..., chosen.slots :] = True
    return shown.repeat_interleave(call.q.shape[1] // shown.shape[1], dim=1)[:, :, None]


def _in_columns(
    call: Call, mask: Tensor | None
) -> Bool[Tensor, "batch mask_heads query keys"] | None:
    """The model's mask, whose columns are the original ones, for the slots that are there."""
    columns = call.columns
    mask = _boolean(mask)
    if columns is None:
        return mask
    there = columns >= 0
    if mask is None:
        if call.q.shape[2] > 1 and call.is_causal:
            there = there[:, :, None] & (columns[:, :, None] <= call.queries[:, None])
        elif bool(there.all()):
            return None
        else:
            there = there[:, :, None]
    else:
        at = columns.clamp(min=0).long()
        if mask.shape[1] > 1:
            at, there = (x.repeat_interleave(call.groups, dim=1) for x in (at, there))
        batch, kv_heads, slots = at.shape
        size = (batch, kv_heads, call.q.shape[2])
        at = at[:, :, None].expand(*size, slots)
        there = mask.expand(*size, mask.shape[-1]).gather(3, at) & there[:, :, None]
    if there.shape[1] != call.q.shape[1]:
        there = there.repeat_interleave(call.groups, dim=1)
    return there.expand(-1, -1, call.q.shape[2], -1)


def _boolean(mask: Tensor | None) -> Tensor | None:
    if mask is not None and mask.dtype != torch.bool:
        raise UserError(
            f"attach takes a boolean attention mask (True = may attend), got one of {mask.dtype}; "
            "give the 2-D mask of 0 and 1, or a boolean 4-D one"
        )
    return mask


def _both(call: Call, extra: Tensor | None) -> Bool[Tensor, "batch mask_heads query keys"] | None:
    """The mask in force and a part's, where one has none also the causal one that it implies."""
    if extra is None:
        return call.mask
    query, slots = call.q.shape[2], call.k.shape[2]
    mask = call.mask
    if mask is None and call.is_causal and query > 1:
        mask = torch.ones(query, slots, dtype=torch.bool, device=extra.device).tril()[None, None]
    both = extra if mask is None else mask & extra
    heads = both.shape[1] if both.ndim == 4 else 1
    return both.expand(call.q.shape[0], heads, query, slots)


def _score_mod(call: Call, mods: Sequence[ScoreMod | None]) -> ScoreMod | None:
    """Soft cap, then position bias, then the parts' changes, as one function; None for none."""
    softcap: Any = call.kwargs.get("softcap")
    bias: Any = call.kwargs.get("position_bias")
    first = call.step.offset

    def cap(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        capped: Tensor = (s / softcap).tanh() * softcap
        return capped

    def add_bias(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        changed: Tensor = s + bias[b * (bias.shape[0] > 1), h, q - first, k]
        return changed

    chain: list[ScoreMod] = [mod for mod in mods if mod is not None]
    if bias is not None:
        chain.insert(0, add_bias)
    if softcap is not None:
        chain.insert(0, cap)
    if not chain:
        return None

    def together(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        for mod in chain:
            s = mod(s, b, h, q, k)
        return s

    return together


def _heads(
    session: Session, call: Call, mask: Tensor | None, dropout: float
) -> Float[Tensor, "batch query heads value_dim"]:
    """Attention proper: as the cache holds its keys, else SDPA unless scores are changed."""
    if _as_held(session, call):
        heads = call.cache_layer.attend(
            call.q, scale=call.scaling, visible=_boolean(mask), sinks=call.sinks, chosen=call.chosen
        )
        return heads.transpose(1, 2).contiguous()  # type: ignore[no-any-return]
    if call.score_mod is None and call.sinks is None:
        heads, _ = sdpa_attention_forward(
            call.module, call.q, call.k, call.v, call.mask,
            dropout=dropout, scaling=call.scaling, is_causal=call.is_causal,
        )  # fmt: skip
        return heads  # type: ignore[no-any-return]
    if dropout:
        raise UserError(
            "attach cannot honour dropout together with changed scores; call model.eval()"
        )
    pattern: Tensor | masks.Mask | None = call.mask
    if pattern is None and call.is_causal and call.q.shape[2] > 1:
        pattern = masks.causal
    heads, lse = ops.attend(
        call.q, call.k, call.v, mask=pattern, score_mod=_in_slots(call), scale=call.scaling,
        return_lse=True, q_offset=0,
    )  # fmt: skip
    if call.sinks is not None:
        share = torch.sigmoid(lse - call.sinks.to(lse.dtype)[:, None])
        heads = heads * share[..., None].to(heads.dtype)
    return heads.transpose(1, 2).contiguous()


def _in_slots(call: Call) -> ScoreMod | None:
    """The score change in terms of this call's query and slot numbers."""
    mod, columns, first = call.score_mod, call.columns, call.step.offset
    if mod is None or (columns is None and first == 0):
        return mod
    groups = call.groups

    def slots(s: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mod(s, b, h, q + first, k if columns is None else columns[b, h // groups, k])

    return slots


def _look(session: Session, call: Call) -> None:
    if session.recorders:
        for weights, queries, keys in weight_blocks(call):
            for recorder in session.recorders:
                recorder.update(call, weights, queries, keys)
    for part in session.observers:
        part.observe(call)
    if isinstance(call.cache_layer, StoredLayer) and not call.step.chunked:
        call.cache_layer.settled = True
