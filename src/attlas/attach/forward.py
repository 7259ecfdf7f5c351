"""The attention function that attached models call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attlas import masks, ops
from attlas.attach.blocks import weight_blocks
from attlas.attach.call import Call
from attlas.errors import UserError
from attlas.positions import ScoreMod

if TYPE_CHECKING:
    from attlas.attach.session import Session

#: The session of each attention module of the models attached now.
SESSIONS: dict[nn.Module, Session] = {}

#: Arguments of other attention functions, with what a user may do instead.
REFUSED = {
    "cache": "continuous batching's paged cache cannot be intercepted; use generate()",
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
    if session.direct and kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    call = _call(session, module, query, key, value, attention_mask, scaling, kwargs)
    heads = _heads(call, dropout)
    for part in session.editors:
        heads = part.output(call, heads)
    if session.observers or session.recorders:
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
        columns = getattr(call.cache_layer, "columns", None)
        call.columns = columns() if columns is not None else None
    call.mask = _in_columns(call, mask)
    for part in session.maskers:
        call.mask = _both(call, part.mask(call))
    call.score_mod = _score_mod(call, [part.score_mod(call) for part in session.modders])
    return call


def _in_columns(
    call: Call, mask: Tensor | None
) -> Bool[Tensor, "batch mask_heads query keys"] | None:
    """The model's mask, whose columns are the original ones, for the slots that are there."""
    columns = call.columns
    if mask is not None and mask.dtype != torch.bool:
        raise UserError(
            f"attach takes a boolean attention mask (True = may attend), got one of {mask.dtype}; "
            "give the 2-D mask of 0 and 1, or a boolean 4-D one"
        )
    if columns is None:
        return mask
    there = columns >= 0
    if mask is None:
        if call.q.shape[2] > 1 and call.is_causal:
            there = there[:, :, None] & (columns[:, :, None] <= call.queries[:, None])
        elif getattr(call.cache_layer, "ragged", False):
            there = there[:, :, None]
        else:
            return None
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


def _heads(call: Call, dropout: float) -> Float[Tensor, "batch query heads value_dim"]:
    """Attention proper: SDPA unless scores are changed."""
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
    mask: Tensor | masks.Mask | None = call.mask
    if mask is None and call.is_causal and call.q.shape[2] > 1:
        mask = masks.causal
    heads, lse = ops.attend(
        call.q, call.k, call.v, mask=mask, score_mod=_in_slots(call), scale=call.scaling,
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
